"""What `python -m benchmarks.train` runs."""

from benchmarks.runner.command_line import exit_with
from benchmarks.train.run import main

exit_with(main)
