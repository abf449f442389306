"""What all-to-alls cost: bytes that leave a rank, there and back, and only while they are counted."""

import time

import pytest
import torch

from moe_train.distributed.all_to_all import Splits, start_counts, start_rows
from moe_train.distributed.collectives import world_group
from moe_train.distributed.observer import CommObserver
from moe_train.distributed.traffic import Traffic, TrafficMeter

CPU = torch.device("cpu")
WIDTH = 3


def test_only_what_is_counted_counts() -> None:
    meter = TrafficMeter(CPU)
    with meter.measure(1000):
        pass
    assert meter.read() == Traffic(0.0, 0)
    with meter.counting():
        for _ in range(2):
            with meter.measure(10):
                time.sleep(0.02)
        time.sleep(0.2)  # between two all-to-alls
    with meter.measure(1000):
        time.sleep(0.2)
    found = meter.read()
    assert found.num_bytes == 20 and 0.04 <= found.seconds < 0.2
    assert meter.read() == found  # reading changes nothing
    meter.reset()
    assert meter.read() == Traffic(0.0, 0)


def test_counting_ends_with_an_error_in_the_block() -> None:
    meter = TrafficMeter(CPU)
    with pytest.raises(RuntimeError), meter.counting():
        raise RuntimeError("a step failed")
    with meter.measure(10):
        pass
    assert meter.read().num_bytes == 0


def exchange(rank, world_size):
    """Rank r sends (r + 1) x (d + 1) rows to rank d; the bytes after the forward and after the backward pass."""
    meter, group = TrafficMeter(CPU), world_group()
    send = [(rank + 1) * (d + 1) for d in range(world_size)]
    receive = [(s + 1) * (rank + 1) for s in range(world_size)]
    rows, splits = torch.ones(sum(send), WIDTH, requires_grad=True), Splits(tuple(send), tuple(receive))
    with meter.counting():
        start_counts(torch.ones(world_size, 2, dtype=torch.int64), group, CommObserver(meter)).wait()
        after_counts = meter.read().num_bytes
        arrived = start_rows(rows, splits, group, CommObserver(meter)).wait()
        after_forward = meter.read().num_bytes
        arrived.sum().backward()
    start_rows(rows.detach(), splits, group, CommObserver(meter)).wait()  # not counted
    found = meter.read()
    return after_counts, after_forward - after_counts, found.num_bytes - after_forward, found.seconds


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_that_leave_a_rank_in_both_passes(world_size, request) -> None:
    results = request.getfixturevalue(f"pool{world_size}").run(exchange, timeout=60)
    for rank, (counts, forward, backward, seconds) in enumerate(results):
        others = [d for d in range(world_size) if d != rank]
        assert counts == len(others) * 2 * 8  # two int64 each
        assert forward == sum((rank + 1) * (d + 1) for d in others) * WIDTH * 4
        assert backward == forward  # the splits are symmetric: the gradients of what came go back
        assert 0 < seconds < 30


class FakeEvent:
    """A CUDA event as far as the meter uses one: the clock moves by one millisecond a record."""

    now = 0.0
    waited = 0
    has_happened = True

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def query(self) -> bool:
        return FakeEvent.has_happened

    def synchronize(self) -> None:
        FakeEvent.waited += 1

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at  # milliseconds


@pytest.mark.parametrize("has_happened", [True, False])
def test_on_cuda_events_are_read_later_and_do_not_pile_up(monkeypatch, has_happened) -> None:
    """The real events need a GPU; what is tested is what the meter does with them."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "waited", 0)
    monkeypatch.setattr(FakeEvent, "has_happened", has_happened)
    meter = TrafficMeter(torch.device("cuda"))
    with meter.counting():
        for _ in range(3000):
            with meter.measure(10):
                pass
    assert FakeEvent.waited == 0
    assert len(meter._pending) == (1024 if has_happened else 3000)
    found = meter.read()
    assert found.num_bytes == 30_000 and found.seconds == pytest.approx(3.0)  # 3,000 times a millisecond
    assert FakeEvent.waited == (1024 if has_happened else 3000)
