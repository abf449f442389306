"""Exit codes, and the errors that carry one."""

EXIT_USAGE = 2  # exit code of bad usage, configuration or input
EXIT_DIVERGED = 65  # exit code of a run that cannot recover from bad numbers: it would fail again
EXIT_LOST = 70  # exit code of a run that hung or lost a rank: starting it again makes sense
EXIT_STOPPED = 75  # exit code of a run that a signal stopped after saving: start it again to continue


class UsageError(ValueError):
    """Error for a bad option, configuration or input; it names the field or file, the value and what would be right.

    The command line prints the message alone, without a traceback.
    """

    exit_code = EXIT_USAGE


class RunFailed(RuntimeError):
    """Error for a run that failed on this rank; the message names the rank, the reason and the log."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TrainingDiverged(RuntimeError):
    """Error for training that cannot recover from bad numbers; the message names them and the diagnosis file."""

    exit_code = EXIT_DIVERGED


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that an error ends: the error's own, or 1 for an error of unknown kind."""
    return int(getattr(error, "exit_code", 1))


def one_line(text: str) -> str:
    """Escape what cannot be printed in a message: a word or a key may have any character."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
