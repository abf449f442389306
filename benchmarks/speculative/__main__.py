"""What `python -m benchmarks.speculative` runs."""

from benchmarks.runner.command_line import exit_with
from benchmarks.speculative.run import main

exit_with(main)
