"""Lost ranks are noticed and named by the others: killed, stopped, failed; those that leave are not."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_train.config.errors import EXIT_LOST
from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.liveness.hang_report import Reporter
from moe_train.liveness.peers import PeerMonitor
from tests.liveness.worlds import Rank, RankWorld, reduce_all


def work_until_a_signal(place: Rank, lost: int, number: int) -> None:
    """All-reduces; in the fifth, one rank is not there any more."""
    for step in range(1, 100):
        place.flight_recorder.at("forward", step)
        if step == 5 and place.rank == lost:
            time.sleep(1.5)  # signs of life have been seen
            os.kill(os.getpid(), number)
        try:
            reduce_all()
        except RuntimeError:
            started = time.monotonic()
            found = place.peers.culprit(20)
            place.say(found=found, seconds=time.monotonic() - started)
            place.peers.fail(f"lost: {found}")
            os._exit(EXIT_LOST)


def fail_on_one(place: Rank, failing: int) -> None:
    """One rank raises; the others wait for it."""
    reduce_all()
    if place.rank == failing:
        started = time.monotonic()
        place.peers.fail("ValueError: a bad number")
        place.say(seconds=time.monotonic() - started)
        return
    try:
        reduce_all()
    except RuntimeError:
        place.say(found=place.peers.culprit(10))
        place.peers.fail("a consequence")


def leave_in_order(place: Rank) -> None:
    """The ranks leave one after the other, and each stays alive for a while after rank 0 is gone."""
    reduce_all()
    time.sleep(0.3 * place.rank)
    started = time.monotonic()
    place.peers.leave()
    place.say(seconds=time.monotonic() - started)
    if place.rank > 0:
        time.sleep(1.5)
        place.say(seconds=0, found=place.peers.culprit(1.5))


def stay_while_others_leave(place: Rank) -> None:
    """Rank 2 goes on for longer than the patience with silence after the others have left and ended."""
    reduce_all()
    if place.rank == 2:
        time.sleep(6)
        place.say(found=place.peers.culprit(0.5))
    place.peers.leave()


@dataclass(frozen=True)
class Loss:
    """A rank that is lost, and the world it was of."""

    lost: int
    signal: int
    world: RankWorld

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(3) if rank != self.lost]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Loss]]:
    """Worlds at the same time, since they mostly wait: each loses rank 0, which holds the store, or another."""
    with ExitStack() as stack:
        found = []
        for lost, number in itertools.product((0, 2), (signal.SIGKILL, signal.SIGSTOP)):
            world = RankWorld(work_until_a_signal, tmp_path_factory.mktemp("loss"), lost, number)
            found.append(Loss(lost, number, stack.enter_context(world)))
        yield found


def test_a_killed_rank_is_named(losses: list[Loss]) -> None:
    for loss in [loss for loss in losses if loss.signal == signal.SIGKILL]:
        assert loss.world.wait(loss.others, 40) == dict.fromkeys(loss.others, EXIT_LOST)
        for rank in loss.others:
            said = loss.world.said(rank)
            print(f"rank {loss.lost} killed, rank {rank}: {said}")
            sign = "is gone" if loss.lost == 0 else "has given no sign of life for"
            assert said["found"].startswith(f"rank {loss.lost} {sign}")
            assert said["seconds"] < 10  # about 4 of patience; room for a busy machine


def test_a_stopped_rank_makes_the_stuck_ones_end(losses: list[Loss]) -> None:
    """SIGSTOP: connections stay open, nothing fails, and requests to a store that is stopped do not return."""
    for loss in [loss for loss in losses if loss.signal == signal.SIGSTOP]:
        assert loss.world.wait(loss.others, 30) == dict.fromkeys(loss.others, EXIT_LOST)
        for rank in loss.others:
            report = loss.world.report(rank)
            print(report.splitlines()[1])
            assert f"rank {loss.lost} has given no sign of life for" in report
            assert f"rank {rank} is at step 5, phase forward" in report
            assert "in reduce_all" in report and report.count("Thread 0x") >= 3


def test_what_a_rank_failed_of_reaches_the_others(tmp_path: Path) -> None:
    with ExitStack() as stack:
        worlds = [stack.enter_context(RankWorld(fail_on_one, tmp_path / str(rank), rank)) for rank in (0, 1)]
        for failing, world in enumerate(worlds):
            check_failure(world, failing)


def check_failure(world: RankWorld, failing: int) -> None:
    assert world.wait([0, 1, 2], 30) == {0: 0, 1: 0, 2: 0}
    for rank in {0, 1, 2} - {failing}:
        assert world.said(rank)["found"] == f"rank {failing} failed: ValueError: a bad number"
    assert world.said(failing)["seconds"] < 4


@pytest.mark.slow
def test_those_who_leave_are_not_accused(tmp_path: Path) -> None:
    with RankWorld(leave_in_order, tmp_path / "a") as first, RankWorld(stay_while_others_leave, tmp_path / "b") as last:
        assert first.wait([0, 1, 2], 20) == {0: 0, 1: 0, 2: 0}
        assert first.said(1)["found"] is None and first.said(2)["found"] is None
        assert first.said(0)["seconds"] < 2.5  # it waits for rank 2, which leaves after 0.6 s, and no longer
        assert last.wait([0, 1, 2], 20) == {0: 0, 1: 0, 2: 0}
        assert last.said(2)["found"] is None


def test_one_process_loses_nobody() -> None:
    monitor = PeerMonitor(None, 0, 1, 5, Reporter(0, FlightRecorder(), []))
    monitor.start()
    started = time.monotonic()
    assert monitor.culprit(10) is None and monitor.suspect() is None
    monitor.fail("ValueError: of its own")
    monitor.leave()
    assert time.monotonic() - started < 1
