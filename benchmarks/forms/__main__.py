"""What `python -m benchmarks.forms` runs."""

from benchmarks.forms.run import main
from benchmarks.runner.command_line import exit_with

exit_with(main)
