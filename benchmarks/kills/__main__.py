"""What `python -m benchmarks.kills` runs."""

from benchmarks.kills.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
