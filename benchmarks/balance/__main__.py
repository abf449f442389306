"""What `python -m benchmarks.balance` runs."""

from benchmarks.balance.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
