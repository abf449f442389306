"""Training runs that a benchmark compares: `python -m moe_train train` as subprocesses, several at a time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_POLL_SECONDS = 0.2
_SHOWN_LINES = 15  # of the output of a run that failed


@dataclass(frozen=True)
class TrainingRun:
    """One run on the CPU, in one process of one thread.

    Attributes:
        name: For messages.
        folder: Its run folder, which must not hold an earlier run.
        options: Of `moe_train train`, without the run folder.
    """

    name: str
    folder: Path
    options: tuple[str, ...]

    @property
    def output(self) -> Path:
        """The file of what it prints: beside the run folder, which it creates itself."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def records(self) -> list[dict[str, Any]]:
        """What it wrote to metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


class RunFailed(RuntimeError):
    """A run that ended with an error or took too long; the message has the end of its output."""

    def __init__(self, run: TrainingRun, reason: str) -> None:
        lines = run.output.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        shown = "".join(f"\n  | {line}" for line in lines)
        super().__init__(f"run {run.name!r}: {reason}; the end of its output:{shown}")


@dataclass
class _Active:
    """A run under way."""

    run: TrainingRun
    process: subprocess.Popen
    began: float


def run_all(
    runs: Sequence[TrainingRun], jobs: int, timeout_seconds: float, when_done: Callable[[TrainingRun, float], None]
) -> None:
    """Train all runs.

    Args:
        runs: In the order to start.
        jobs: How many at a time.
        timeout_seconds: Most time of one run.
        when_done: Called with each run that ended well, and its seconds.

    Raises:
        RunFailed: The first run that did not end well; the others are ended.
    """
    waiting, active = list(reversed(runs)), []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(_start(waiting.pop()))
            time.sleep(_POLL_SECONDS)
            for entry in list(active):
                seconds, code = time.monotonic() - entry.began, entry.process.poll()
                if code is None and seconds > timeout_seconds:
                    raise RunFailed(entry.run, f"not done after {timeout_seconds:.0f} s")
                if code:
                    raise RunFailed(entry.run, f"exit code {code}")
                if code == 0:
                    active.remove(entry)
                    when_done(entry.run, seconds)
    finally:
        for entry in active:
            entry.process.kill()
        for entry in active:
            entry.process.wait()


def _start(run: TrainingRun) -> _Active:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe_train", "train", *run.options, f"--train.run_dir={run.folder}"]
    with run.output.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    return _Active(run, process, time.monotonic())
