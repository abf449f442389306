"""Exit codes, and the errors that carry one."""

EXIT_USAGE = 2  # exit code of bad usage, configuration or input
EXIT_DIVERGED = 65  # exit code of a run whose numbers went wrong for good: it would go wrong again
EXIT_LOST = 70  # exit code of a run that hung or lost a rank: starting it again makes sense
EXIT_STOPPED = 75  # exit code of a run stopped by a signal after saving: start it again to go on


class UsageError(ValueError):
    """A bad option, configuration or input; its message names the field or file, the value and what would be right.

    The command line prints the message alone, without a traceback.
    """

    exit_code = EXIT_USAGE


class RunFailed(RuntimeError):
    """A run that failed on this rank; the message names the rank, the reason and the log."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TrainingDiverged(RuntimeError):
    """Numbers went wrong for good; the message says which, and where the diagnosis is."""

    exit_code = EXIT_DIVERGED


def exit_code_of(error: BaseException) -> int:
    """Exit code of a process that this error ends: the error's own, or 1 for an error of no known kind."""
    return int(getattr(error, "exit_code", 1))
