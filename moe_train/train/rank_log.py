"""Log of a rank, with what libraries print.

Until the run's lock is held, another run may be at work in the folder: a start writes into a file of its own, and
`RankLog.begin` moves to the log of the run.
"""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from moe_train.config.errors import UsageError
from moe_train.host.processes import exists
from moe_train.train.run_folder import RunFolder


@dataclass
class RankLog:
    """Log of this rank.

    Attributes:
        folder: Folder of the run.
        rank: Rank of this process.
        output: Standard output as it was.
        errors: Standard error as it was.
        path: File that is written to now.
    """

    folder: RunFolder
    rank: int
    output: TextIO
    errors: TextIO
    path: Path
    _descriptors: list[int] = field(default_factory=list)
    _follow: Callable[[Path], object] = lambda path: None

    def begin(self) -> None:
        """Move to the run's log, once its lock is held. It takes what earlier starts on this host have left too."""
        self.path = self.folder.log(self.rank)
        self._follow(self.path)
        with self.path.open("ab") as log:
            for number in self._descriptors:
                os.dup2(log.fileno(), number)
            for own in sorted(self.path.parent.glob(self.folder.start_log(self.rank, "*").name)):
                pid = own.stem.rpartition("_")[2]
                if pid == str(os.getpid()) or (pid.isdecimal() and not exists(int(pid))):
                    with contextlib.suppress(FileNotFoundError):  # the other start has been refused right now
                        log.write(own.read_bytes())
                        own.unlink()

    def discard(self) -> None:
        """Remove the log of a start that was refused before the lock was held: its message says all."""
        if self.path != self.folder.log(self.rank):
            self.path.unlink(missing_ok=True)


def redirect_output(folder: RunFolder, rank: int, follow: Callable[[Path], object]) -> RankLog:
    """Send what libraries print, and log, to a log file until the process ends.

    Args:
        folder: Folder of the run; it exists.
        rank: Rank of this process.
        follow: Called with each file that becomes the log.
    """
    redirection = contextlib.ExitStack()
    log = redirection.enter_context(redirected_output(folder, rank, follow))
    atexit.register(redirection.close)  # keeps it until then
    logging.captureWarnings(True)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
    return log


@contextlib.contextmanager
def redirected_output(
    folder: RunFolder, rank: int, follow: Callable[[Path], object] = lambda path: None
) -> Iterator[RankLog]:
    """Send what libraries print to a log file while the block runs.

    It also works if the streams of Python have no file descriptors, as in a notebook.

    Args:
        folder: Folder of the run; it exists.
        rank: Rank of this process.
        follow: Called with each file that becomes the log.

    Yields:
        The log, with the streams as they were.
    """
    output, errors = sys.stdout, sys.stderr
    path = folder.start_log(rank, os.getpid())
    follow(path)
    stream = path.open("a", encoding="utf-8", buffering=1)  # stays open: loggers that are made meanwhile keep it
    descriptors = [stream.fileno()]
    with contextlib.ExitStack() as undo:
        kept_output = _redirect_descriptor(1, output, stream, descriptors, undo)
        kept_errors = _redirect_descriptor(2, errors, stream, descriptors, undo)
        log = RankLog(folder, rank, kept_output, kept_errors, path, descriptors, follow)
        sys.stdout = sys.stderr = stream
        try:
            yield log
        except UsageError:
            log.discard()
            raise
        finally:
            sys.stdout, sys.stderr = output, errors


def _redirect_descriptor(
    number: int, own: TextIO | None, log: TextIO, redirected: list[int], undo: contextlib.ExitStack
) -> TextIO:
    """Send a file descriptor of the process to the log, and note it; return a stream to where `own` went before."""
    if own is None:  # it was closed when the process started
        return log
    own.flush()
    try:
        kept = os.dup(number)
    except OSError:  # it is closed
        return own
    os.dup2(log.fileno(), number)
    redirected.append(number)
    undo.callback(os.close, kept)
    undo.callback(os.dup2, kept, number)
    try:
        is_descriptor = own.fileno() == number
    except (OSError, AttributeError):  # a stream of a notebook
        return own
    return undo.enter_context(os.fdopen(os.dup(kept), "w", buffering=1, encoding="utf-8")) if is_descriptor else own
