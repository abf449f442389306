"""Types of the options that are paths: what ~ means, and whether a path may be remote, as in a configuration."""

import argparse

from moe_train.config.errors import UsageError
from moe_train.config.paths import expand_user, local_path


def path_argument(text: str) -> str:
    """Return a path of this host, with its home folder written out.

    Raises:
        argparse.ArgumentTypeError: If it is remote, has a variable in it, or the home folder is not known.
    """
    try:
        local_path(text, "the path")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return expand_user(text)


def url_argument(text: str) -> str:
    """Return a path or a URL, with its home folder written out.

    Raises:
        argparse.ArgumentTypeError: If the home folder is not known.
    """
    try:
        return expand_user(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
