"""What `python -m benchmarks.telemetry` runs."""

from benchmarks.runner.command_line import exit_with
from benchmarks.telemetry.run import main

exit_with(main)
