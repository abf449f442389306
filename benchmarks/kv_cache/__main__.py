"""What `python -m benchmarks.kv_cache` runs."""

from benchmarks.kv_cache.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
