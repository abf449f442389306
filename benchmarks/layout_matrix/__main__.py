"""What `python -m benchmarks.layout_matrix` runs."""

from benchmarks.layout_matrix.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
