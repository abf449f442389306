"""What `python -m benchmarks.pictures` runs."""

from benchmarks.pictures.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
