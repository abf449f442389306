"""From measured times to a machine for the planner."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.doctor.collectives import Timing, merge_timings
from moe_train.doctor.machine import combine_products, fit_link, fit_network, make_host
from moe_train.doctor.speed import Speed, measure_link
from tests.doctor.test_judge_ranks import facts

SIZES = (1e3, 1e4, 2.5e5, 4e6, 1.6e7)


@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e11))
def test_line_is_found_again(latency: float, rate: float) -> None:
    link = fit_link([(size, latency + size / rate) for size in SIZES])
    for size in SIZES:  # what the planner asks for; a part that is lost beside the other cannot be found
        assert link.latency_seconds + size / link.bytes_per_second == pytest.approx(latency + size / rate, rel=1e-3)


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=5))
def test_any_times_give_a_link(times: list[float]) -> None:
    link = fit_link(list(zip(SIZES, times)))
    assert link.latency_seconds >= 0 and link.bytes_per_second > 0


def test_one_size_is_a_rate() -> None:
    assert fit_link([(1e6, 1e-3)]).model_dump() == {"latency_seconds": 0.0, "bytes_per_second": pytest.approx(1e9)}


def timing(seconds: float, correct: bool = True, operation: str = "all_reduce") -> Timing:
    return Timing(operation, "within", 1000, 1000.0, seconds, correct)


def test_groups_of_a_scope_are_merged() -> None:
    merged = merge_timings([[timing(1.0)], [timing(3.0, correct=False)], [timing(2.0)]])
    assert merged == [timing(2.0, correct=False)]


def test_network_needs_all_operations() -> None:
    assert fit_network([timing(1.0)], "within") is None
    found = fit_network([timing(1.0, operation=name) for name in ("all_reduce", "all_gather", "all_to_all")], "within")
    assert found is not None and found.all_reduce.bytes_per_second == pytest.approx(1000.0)
    assert found.ring is None  # measured by earlier versions, or not at all


def test_products_that_all_ranks_have() -> None:
    speeds = [
        Speed({"fp32": [(16, 64, 1e9 * rank), (64, 64, 5e9)][: 2 if rank < 3 else 1]}, 1e9, 1e-6) for rank in (1, 2, 3)
    ]
    (product,) = combine_products(speeds)["fp32"]
    assert (product.rows, product.width, product.flops_per_second) == (16, 64, 2e9)


def test_the_host_is_that_of_the_ranks_in_the_middle() -> None:
    speeds = [Speed({}, 1e12, 1e-6, 1e10 * rank, 2e10 * rank) for rank in (1, 3, 2)]
    given = facts("aab")
    host = make_host(given, speeds)
    assert host is not None and host.memory_bytes == min(fact.memory for fact in given)
    assert (host.memory_bytes_per_second, host.link_bytes_per_second) == (2e10, 4e10)
    assert make_host(given, [Speed({}, 1e12, 1e-6)] * 3) is None


def test_a_copy_has_a_speed() -> None:
    assert 1e8 < measure_link(torch.device("cpu")) < 1e13
