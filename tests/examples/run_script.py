"""Run a script as `python SCRIPT ARGUMENTS` does, in a process that a fork server has started."""

import runpy
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the script in place of the main module, so that what it registers as `__main__:NAME` is found.

    Args:
        arguments: Path of the script, then its arguments.

    Returns:
        Exit code 0.
    """
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")
    return 0
