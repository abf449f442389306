"""What `python -m benchmarks.truth` runs."""

from benchmarks.runner.command_line import exit_with
from benchmarks.truth.run import main

exit_with(main)
