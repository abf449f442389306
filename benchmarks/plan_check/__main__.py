"""What `python -m benchmarks.plan_check` runs."""

from benchmarks.plan_check.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
