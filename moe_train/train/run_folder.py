"""Folder of a run: config.yaml, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/, logs/, summary.json."""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml
from moe_train.config.paths import local_path
from moe_train.config.root import Config
from moe_train.data import SubwordTokenizer, Tokenizer


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, with the paths of its files."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    def profile(self, rank: int) -> Path:
        """Return the path of a rank's trace, of the profiled steps."""
        return self.root / "profile" / f"rank_{rank:05d}.json"

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log, with what libraries print."""
        return self.root / "logs" / f"rank_{rank:05d}.log"


def open_run_folder(run_dir: str) -> RunFolder:
    """Create the folder of a run if it does not exist.

    Raises:
        UsageError: If the folder cannot be written.
    """
    folder = RunFolder(local_path(run_dir, "train.run_dir"))
    try:
        folder.log(0).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"train.run_dir ({run_dir!r}): cannot be created: {error}") from error
    if not os.access(folder.root, os.W_OK):
        raise UsageError(f"train.run_dir ({run_dir!r}): is not writable")
    return folder


def save_config(folder: RunFolder, config: Config) -> None:
    """Write the resolved configuration."""
    _replace(folder.config, dump_yaml(config))


def save_tokenizer(folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's file, so that the run can be used without its data; tokenizer bytes has no file."""
    if isinstance(tokenizer, SubwordTokenizer):
        _replace(folder.tokenizer, tokenizer.text)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def redirect_output(log: Path) -> tuple[TextIO, TextIO]:
    """Send what libraries print, and log, to a log file until the process ends.

    Args:
        log: Log file; the output is appended.

    Returns:
        Streams of the standard output and error as they were.
    """
    redirection = contextlib.ExitStack()
    streams = redirection.enter_context(redirected_output(log))
    atexit.register(redirection.close)  # keeps it until then
    logging.captureWarnings(True)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
    return streams


@contextlib.contextmanager
def redirected_output(log: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Send what libraries print to a log file while the block runs.

    It also works if the streams of Python have no file descriptors, as in a notebook.

    Args:
        log: File that the output is appended to.

    Yields:
        Streams of standard output and standard error as they were.
    """
    output, errors = sys.stdout, sys.stderr
    stream = log.open("a", encoding="utf-8", buffering=1)  # stays open: loggers that are made meanwhile keep it
    with contextlib.ExitStack() as undo:
        kept = [_redirect_descriptor(number, own, stream, undo) for number, own in ((1, output), (2, errors))]
        sys.stdout = sys.stderr = stream
        try:
            yield kept[0], kept[1]
        finally:
            sys.stdout, sys.stderr = output, errors


def _redirect_descriptor(number: int, own: TextIO | None, log: TextIO, undo: contextlib.ExitStack) -> TextIO:
    """Send a file descriptor of the process to the log; return a stream to where `own` went before."""
    if own is None:  # it was closed when the process started
        return log
    own.flush()
    try:
        kept = os.dup(number)
    except OSError:  # it is closed
        return own
    os.dup2(log.fileno(), number)
    undo.callback(os.close, kept)
    undo.callback(os.dup2, kept, number)
    try:
        is_descriptor = own.fileno() == number
    except (OSError, AttributeError):  # a stream of a notebook
        return own
    return undo.enter_context(os.fdopen(os.dup(kept), "w", buffering=1, encoding="utf-8")) if is_descriptor else own
