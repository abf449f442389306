"""Progress display of data preparation: a bar on a terminal; elsewhere, one line at the start and one at the end."""

import sys
import time
from types import TracebackType
from typing import Any, Self


class PreparationReport:
    """Context manager that shows the progress of one pass over a corpus on standard error.

    Args:
        description: Name of the corpus in messages.
        size_bytes: Upper bound of the size of the text, in bytes.
        show_bar: Whether to draw a bar where standard error is a terminal.
    """

    def __init__(self, description: str, size_bytes: int, show_bar: bool) -> None:
        self.documents = 0
        self.tokens = 0
        self.num_bytes = 0
        self._description = description
        self._size_bytes = size_bytes
        self._show_bar = show_bar and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._start = 0.0

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if self._show_bar:
            self._bar = _open_bar()
            self._task = self._bar.add_task(f"tokenizing {self._description}", total=self._size_bytes or None)
        else:
            say(f"tokenizing {self._description}: up to {self._size_bytes / 1e6:,.1f} MB")
        return self

    def advance(self, documents: int, tokens: int, num_bytes: int) -> None:
        """Add to the counts of what has been tokenized.

        Args:
            documents: Further documents.
            tokens: Further tokens, end-of-document tokens included.
            num_bytes: Further bytes of text as UTF-8.
        """
        self.documents += documents
        self.tokens += tokens
        self.num_bytes += num_bytes
        if self._bar is not None:
            self._bar.advance(self._task, num_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error is None:
            say(
                f"tokenized {self._description}: {self.documents:,} documents, {self.tokens:,} tokens, "
                f"{self.num_bytes:,} bytes in {time.monotonic() - self._start:.1f} s"
            )


def say(line: str) -> None:
    """Print a line on standard error at once."""
    print(line, file=sys.stderr, flush=True)


def _open_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.start()
    return bar
