"""What `python -m benchmarks.parity` runs."""

from benchmarks.parity.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
