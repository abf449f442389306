"""The most bytes at one time, counted allocation by allocation, from a profile of torch on the CPU."""

from collections.abc import Iterator
from typing import Any

from torch._C._profiler import _EventType

STEP = "benchmark/step"  # name of the ranges that count


def peak_bytes(profile: Any) -> int:
    """Most bytes at one time in any step but the first, in which the optimizer's states are made.

    What gloo's threads free is not reported (torch 2.13): such a block is taken to be free when its address is given
    out again.
    """
    results = profile.profiler.kineto_results
    steps = sorted((event.start_ns(), event.end_ns()) for event in results.events() if event.name() == STEP)[1:]
    live: dict[int, int] = {}
    held = most = 0
    for when, address, size in sorted(_allocations(results.experimental_event_tree())):
        if size > 0:
            held += size - live.get(address, 0)
            live[address] = size
        else:
            held -= live.pop(address, 0)
        if any(begin <= when <= end for begin, end in steps):
            most = max(most, held)
    return most


def _allocations(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Allocations in a tree of events: when, address, bytes; negative bytes where it is freed."""
    left = list(events)
    while left:
        event = left.pop()
        left.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
