"""Whether this process writes to file descriptors, which can be copied and redirected."""

import sys


def has_descriptors() -> bool:
    """Return whether the output goes to file descriptors; in a notebook it does not."""
    try:
        return all(stream.fileno() >= 0 for stream in (sys.stdout, sys.stderr))
    except (OSError, AttributeError):  # a stream of a notebook, or none at all
        return False
