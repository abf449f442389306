"""What `python -m benchmarks.checkpoint` runs."""

from benchmarks.checkpoint.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
