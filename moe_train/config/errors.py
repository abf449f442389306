"""What a user can put right: a bad option, configuration or input."""

EXIT_USAGE = 2  # exit code of bad usage, configuration or input
EXIT_DIVERGED = 65  # exit code of a run whose numbers went wrong for good: it would go wrong again
EXIT_LOST = 70  # exit code of a run that hung or lost a rank: starting it again makes sense
EXIT_STOPPED = 75  # exit code of a run stopped by a signal after saving: start it again to go on


class UsageError(ValueError):
    """A bad option, configuration or input; its message names the field or file, the value and what would be right.

    The command line prints the message alone, without a traceback, and ends with exit code 2.
    """
