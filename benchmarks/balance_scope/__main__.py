"""What `python -m benchmarks.balance_scope` runs."""

from benchmarks.balance_scope.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
