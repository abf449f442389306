"""What `python -m benchmarks.moe_layer` runs."""

from benchmarks.moe_layer.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
