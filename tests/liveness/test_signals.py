"""Signals before training, which of them count as a second one, and handlers put back."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_train.config.errors import RunFailed
from moe_train.liveness.signals import SIGNALS, EarlyStop, StopSignals
from tests.train.runs import CPU, ROOT

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("arrivals", "is_ended"),
    [
        ([(TERM, 0.0)], False),
        ([(INT, 0.0), (TERM, 0.5)], False),  # Ctrl-C reached this rank and its launcher, which hands it on
        ([(INT, 0.0), (TERM, 0.5), (TERM, 1.5)], False),  # and the launcher's launcher
        ([(INT, 0.0), (TERM, 2.5)], True),
        ([(INT, 0.0), (INT, 0.3)], True),
        ([(TERM, 0.0), (TERM, 0.05)], False),  # Slurm sends to the task and to its step
        ([(USR1, 0.0), (USR1, 0.2)], True),
    ],
)
def test_a_second_request_is_told_from_the_echo_of_the_first(arrivals, is_ended: bool) -> None:
    said, ends, now = [], [], [0.0]
    signals = StopSignals(said.append, ends.append, clock=lambda: now[0])
    for received, at in arrivals:
        now[0] = 100 + at
        signals._take(received)
    assert signals.received == arrivals[0][0]
    assert bool(ends) == is_ended and (not ends or ends == [128 + arrivals[-1][0]])
    assert arrivals[0][0].name in said[0]


def test_real_signals_are_noted_and_handlers_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    noted = threading.Event()
    with StopSignals(lambda _: noted.set()) as signals:
        assert signals.received is None
        os.kill(os.getpid(), USR1)
        assert noted.wait(5) and signals.received == USR1
        signals.ignore()
    # A rank that leaves with its exit code is not to be ended by its launcher any more.
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 3
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)
    with StopSignals(lambda _: None):
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_before_training_is_an_orderly_end(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "launch/train.py",
        "--config",
        "configs/quickstart.yaml",
        f"--train.run_dir={tmp_path}/r",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, **CPU})
    try:
        deadline = time.monotonic() + 60
        while not int(caught(process.pid), 16) >> (signal.SIGTERM - 1) & 1:  # the interpreter is about to start
            assert time.monotonic() < deadline
        process.terminate()
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, text
    assert text == "rank 0: SIGTERM: ended at once, as no step is under way; the same command goes on from here\n"


def caught(pid: int) -> str:
    """The signals for which a process has handlers, as /proc writes them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("SigCgt:"))


def test_training_takes_the_signals_over_and_gives_them_back() -> None:
    early, ends, noted = [], [], threading.Event()
    before = [signal.getsignal(number) for number in SIGNALS]
    with EarlyStop(early.append, lambda code: (ends.append(code), noted.set())):
        with StopSignals(lambda _: noted.set()) as signals:
            os.kill(os.getpid(), TERM)
            assert noted.wait(5) and signals.received == TERM and not early
        noted.clear()
        os.kill(os.getpid(), TERM)
        assert noted.wait(5) and ends == [75] and "SIGTERM" in early[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_has_failed_may_say_why_first() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with pytest.raises(RunFailed), EarlyStop(lambda _: None):
            raise RunFailed("rank 0: rank 1 is gone", 70)
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)
