"""Steps that do not end: every rank writes where it is, also the one that all wait for."""

import threading
import time
from pathlib import Path

import torch

from moe_train.config.errors import EXIT_LOST
from moe_train.distributed.all_to_all import Splits, start_rows
from moe_train.distributed.collectives import world_group
from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.distributed.observer import CommObserver
from moe_train.liveness.hang_report import Reporter
from moe_train.liveness.watchdog import Watchdog
from tests.liveness.worlds import Rank, RankWorld

LIMIT = 3  # seconds


def collective(place: Rank, direction: str) -> None:
    """An all-to-all of layer 3, in which rank r sends r + 1 rows to each, and its way back."""
    rows = torch.ones(3 * (place.rank + 1), 2, requires_grad=True)
    observer = CommObserver(flight_recorder=place.flight_recorder, layer=3)
    arrived = start_rows(rows, Splits((place.rank + 1,) * 3, (1, 2, 3)), world_group(), observer).wait()
    if place.rank == 1 and direction == "backward":
        sleep_for_ever()
    arrived.sum().backward()


def sleep_for_ever() -> None:
    time.sleep(600)


def get_stuck(place: Rank, direction: str) -> None:
    """Rank 1 stops in Python at step 2, before an all-to-all of the given direction."""
    watchdog = Watchdog(LIMIT, place.reporter, place.peers.suspect)
    watchdog.start()
    for step in (1, 2):
        with watchdog.watching():
            place.flight_recorder.at("forward", step)
            if step == 1:
                collective(place, "neither")
            elif place.rank == 1 and direction == "forward":
                sleep_for_ever()
            else:
                collective(place, direction)


def check_reports(world: RankWorld, direction: str) -> None:
    assert world.wait([0, 1, 2], 30) == dict.fromkeys(range(3), EXIT_LOST)
    for rank in range(3):
        report = world.report(rank)
        splits = [[rank + 1] * 3, [1, 2, 3]]
        send, receive = splits if (direction == "forward") != (rank == 1) else reversed(splits)
        done = "forward" if direction != "forward" else "backward"  # what rank 1 did last
        assert f"rank {rank}: the step has not ended within {LIMIT} s\n" in report  # and nobody is accused
        place = "in no all-to-all; the last was" if rank == 1 else "in"
        way = done if rank == 1 else direction
        expected = f"rank {rank} is at step 2, phase forward, {place} all_to_all_rows of layer 3, {way}: "
        assert f"{expected}send {send}, receive {receive}\n" in report
        assert ("in sleep_for_ever" if rank == 1 else "in finish") in report
        assert "in _talk" in report and "in _judge" in report  # all threads


def test_every_rank_reports_also_the_stuck_one(tmp_path: Path) -> None:
    with (
        RankWorld(get_stuck, tmp_path / "f", "forward") as one,
        RankWorld(get_stuck, tmp_path / "b", "backward") as two,
    ):
        check_reports(one, "forward")
        check_reports(two, "backward")


class Ends:
    """Exit codes in place of an exit."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


def test_each_block_has_the_whole_time_and_outside_there_is_none(tmp_path: Path) -> None:
    ends = Ends()
    with (tmp_path / "log").open("w") as log:
        reporter = Reporter(0, FlightRecorder(), [log], ends, grace_seconds=0)
        watchdog = Watchdog(0.5, reporter, lambda: "rank 7 failed: x")
        watchdog.start()
        for _ in range(4):
            with watchdog.watching():
                time.sleep(0.2)
        time.sleep(0.8)
        assert not ends.codes
        started = time.monotonic()
        with watchdog.watching("a validation batch"):
            assert ends.happened.wait(10)
        assert 0.5 <= time.monotonic() - started < 3
    assert ends.codes == [EXIT_LOST]
    assert "rank 0: a validation batch has not ended within 0.5 s; rank 7 failed: x\n" in (tmp_path / "log").read_text()


def test_a_stop_of_the_whole_process_is_no_hang(tmp_path: Path) -> None:
    ends, lost = Ends(), 0.0

    def clock() -> float:
        return time.monotonic() + lost

    with (tmp_path / "log").open("w") as log:
        watchdog = Watchdog(5, Reporter(0, FlightRecorder(), [log], ends, grace_seconds=0), clock=clock)
        watchdog.start()
        with watchdog.watching():
            lost = 1000.0
            assert not ends.happened.wait(1.2)
        watchdog.stop()


def test_a_report_is_written_once_and_another_thread_waits_for_the_end(tmp_path: Path) -> None:
    ends = Ends()
    closed = (tmp_path / "closed").open("w")
    closed.close()
    with (tmp_path / "log").open("w") as log:
        reporter = Reporter(2, FlightRecorder(), [closed, log], ends, grace_seconds=0.3)
        reporter.wait_for_end()  # nobody ends anything: returns
        assert not ends.codes
        first = threading.Thread(target=reporter.end, args=("first",))
        first.start()
        time.sleep(0.1)
        reporter.end("second")
        reporter.wait_for_end()
        first.join()
    assert set(ends.codes) == {EXIT_LOST}
    text = (tmp_path / "log").read_text()
    assert "rank 2: first\nrank 2 is at phase start\n" in text and "second" not in text
    assert "most recent call first" in text
