"""What `python -m benchmarks.house` runs."""

from benchmarks.house.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
