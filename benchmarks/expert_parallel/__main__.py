"""What `python -m benchmarks.expert_parallel` runs."""

from benchmarks.expert_parallel.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
