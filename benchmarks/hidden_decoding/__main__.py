"""What `python -m benchmarks.hidden_decoding` runs."""

from benchmarks.hidden_decoding.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
