"""What `python -m benchmarks.mixers` runs."""

from benchmarks.mixers.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
