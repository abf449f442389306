"""What `python -m benchmarks.launcher_kills` runs."""

from benchmarks.launcher_kills.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
