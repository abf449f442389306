"""Which signals count as a second one."""

import os
import signal
import threading

import pytest

from moe_train.liveness.signals import SIGNALS, StopSignals

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
