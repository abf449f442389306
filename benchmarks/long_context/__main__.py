"""What `python -m benchmarks.long_context` runs."""

from benchmarks.long_context.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
