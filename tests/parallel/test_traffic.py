"""What all-to-alls cost: bytes that leave a rank, there and back, and only while they are counted."""

import time

import pytest
import torch

from moe_train.parallel.collectives import all_to_all_counts, all_to_all_rows, world_group
from moe_train.parallel.traffic import Traffic, TrafficMeter

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
    rows = torch.ones(sum(send), WIDTH, requires_grad=True)
    with meter.counting():
        all_to_all_counts(torch.ones(world_size, 2, dtype=torch.int64), group, meter)
        after_counts = meter.read().num_bytes
        arrived = all_to_all_rows(rows, send, receive, group, meter)
        after_forward = meter.read().num_bytes
        arrived.sum().backward()
    all_to_all_rows(rows.detach(), send, receive, group, meter)  # not counted
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


def test_one_process_sends_nothing() -> None:
    meter = TrafficMeter(CPU)
    with meter.counting():
        all_to_all_counts(torch.ones(1, 4, dtype=torch.int64), None, meter)
        all_to_all_rows(torch.ones(5, WIDTH), [5], [5], None, meter)
    assert meter.read() == Traffic(0.0, 0)
