"""Console of a run, on rank 0: a live progress bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_SECONDS_BETWEEN_TICKS = 0.5


@dataclass(frozen=True)
class StepLine:
    """Figures of a progress line."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    max_violation: float | None
    clean_kappa: float | None = None

    @property
    def figures(self) -> str:
        """Text of the line, without its step."""
        left = str(timedelta(seconds=round(self.seconds_left)))
        text = f"loss {self.loss:7.4f}  lr {self.learning_rate:.2e}  grad {self.grad_norm:6.3f}"
        text += f"  {self.tokens_per_second:8,.0f} tok/s  ETA {left}"
        return text + self._balance

    @property
    def short(self) -> str:
        """Short text of the line, which fits beside a bar in 80 columns."""
        left = str(timedelta(seconds=round(self.seconds_left)))
        return f"loss {self.loss:.4f}  {self.tokens_per_second:,.0f} tok/s  ETA {left}{self._balance}"

    @property
    def _balance(self) -> str:
        text = "" if self.max_violation is None else f"  MaxVio {self.max_violation:.2f}"
        return text if self.clean_kappa is None else f"{text}  kappa {self.clean_kappa:.2f}"


class _Console(Console):
    """A console of rich that raises an error if its output is closed; rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("nobody reads it")


class RunConsole:
    """Console of a run. It prints on rank 0, and a closed output never ends the run."""

    def __init__(self, stream: TextIO | None) -> None:
        """Prepare to print.

        Args:
            stream: Stream to print to; None: print nothing, for ranks other than 0.
        """
        # In a notebook plain text goes to its stream: rich would make a block of its own for every line.
        options: dict[str, Any] = {"soft_wrap": True, "highlight": False, "force_jupyter": False}
        self._console = _Console(file=stream, **options) if stream is not None else None
        self._progress: Progress | None = None
        self._task: Any = None
        self._drawn = 0.0  # when the bar was drawn last

    def say(self, message: Any = "") -> None:
        """Print a line, or anything that rich can print."""
        self._guard(lambda console: console.print(message, markup=False))

    @contextmanager
    def progress(self, first_step: int, num_steps: int) -> Iterator[None]:
        """Show progress from first_step to num_steps while the block runs, where a terminal can move its cursor."""
        if self._console is None or not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[figures]}"),
        )
        # The loop draws it, not a thread. What libraries print goes to the log, not through the bar.
        progress = self._progress = Progress(
            *columns, console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._task = progress.add_task("train", total=num_steps, completed=first_step, figures="")
        self._guard(lambda _: progress.start())
        try:
            yield
        finally:
            self._guard(lambda _: progress.stop())
            self._progress = None

    def step(self, line: StepLine, is_due: bool) -> None:
        """Show the figures of a step: on a terminal in place, elsewhere as a line if one is due."""
        if self._progress is not None:
            self._draw(completed=line.step, figures=line.short)
        elif is_due:
            self.say(f"step {line.step:6d}/{line.num_steps}  {line.figures}")

    def tick(self, step: int) -> None:
        """Advance the bar of a terminal from time to time, between steps whose figures are known."""
        if self._progress is not None and time.monotonic() - self._drawn >= _SECONDS_BETWEEN_TICKS:
            self._draw(completed=step)

    def _draw(self, **changes: Any) -> None:
        progress, self._drawn = self._progress, time.monotonic()
        assert progress is not None
        self._guard(lambda _: progress.update(self._task, refresh=True, **changes))

    def _guard(self, show: Any) -> None:
        if self._console is None:
            return
        try:
            show(self._console)
        except OSError as error:
            # Nobody reads any more: the run continues, and its log says so once.
            print(f"standard output is closed ({error}); the run goes on without it", flush=True)
            self._console = self._progress = None
