"""What `python -m benchmarks.scaling` runs."""

from benchmarks.runner.command_line import exit_with
from benchmarks.scaling.run import main

exit_with(main)
