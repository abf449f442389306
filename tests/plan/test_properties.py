"""What must hold of any plan: more of something costs no less; a faster machine takes no longer."""

from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.config.machine import Product
from moe_train.config.run import RecomputedPart
from moe_train.model.count import count_parameters
from moe_train.plan.devices import DEVICES
from moe_train.plan.host import HOST_PARTS
from moe_train.plan.layout import Cluster
from moe_train.plan.memory import PARTS, Decoding
from moe_train.plan.planner import Question, make_plan
from moe_train.plan.rates import Rates
from moe_train.plan.step import TERMS
from tests.plan.cases import LARGE, config_of, planned

RELAXED = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
LAYOUTS = st.fixed_dictionaries(
    {
        "parallel__expert_parallel_size": st.sampled_from([1, 4, 8, 32]),
        "parallel__zero_stage": st.sampled_from([1, 2, 3]),
        "parallel__dispatch": st.sampled_from(["flat", "unique"]),
        "train__recompute": st.sampled_from(get_args(RecomputedPart)),
    }
)


@RELAXED
@given(LAYOUTS)
def test_parts_and_terms_are_whole_and_of_one_sign(layout: dict) -> None:
    plan = planned(**layout)
    assert tuple(plan.memory.parts) == PARTS and min(plan.memory.parts.values()) >= 0
    assert tuple(plan.step.terms) == TERMS and min(plan.step.terms.values()) >= 0
    assert 0 < plan.mfu < 1
    assert plan.step.terms[plan.step.largest_term] == max(plan.step.terms.values())


@RELAXED
@given(LAYOUTS)
def test_larger_micro_batches_take_more_memory(layout: dict) -> None:
    totals = [planned(train__micro_batch_size=size, **layout).memory.total for size in (1, 2, 4)]
    assert totals == sorted(totals)


@RELAXED
@given(LAYOUTS)
def test_recomputation_saves_activations_and_costs_time(layout: dict) -> None:
    plans = {part: planned(**(layout | {"train__recompute": part})) for part in get_args(RecomputedPart)}
    seconds = {part: plan.step.seconds for part, plan in plans.items()}
    for part in ("attention", "experts"):
        assert plans["block"].memory.total <= plans[part].memory.total <= plans["none"].memory.total
        assert seconds["none"] < seconds[part] < seconds["block"]
        half = planned(**(layout | {"train__recompute": part}), train__recompute_every=2)
        assert plans[part].memory.total <= half.memory.total <= plans["none"].memory.total
        assert half.step.seconds == pytest.approx((seconds["none"] + seconds[part]) / 2, rel=0.01)


@RELAXED
@given(LAYOUTS)
def test_offload_moves_memory_to_the_host_and_costs_time(layout: dict) -> None:
    without, moved = (planned(**layout, parallel__offload_optimizer=where) for where in ("none", "cpu"))
    # At least the states, less buffers of one tensor, its gradient's norm and the allocator's share.
    buffers = 10 * max(group.largest for group in moved.memory.states.groups)
    assert moved.memory.total <= without.memory.total - without.memory.states.optimizer_states + buffers
    assert moved.memory.parts["optimizer_states"] == 0
    assert moved.memory.host_total >= without.memory.host_total + 16 * 0.9 * moved.memory.states.partition_elements / 2
    assert tuple(moved.memory.host) == HOST_PARTS and min(moved.memory.host.values()) >= 0
    assert moved.step.seconds > without.step.seconds
    assert moved.step.terms["host_copies"] > 0 == without.step.terms["host_copies"]


@RELAXED
@given(LAYOUTS)
def test_on_a_cpu_offload_saves_nothing(layout: dict) -> None:
    cpu = DEVICES["h100"].model_copy(update={"device": "cpu", "host": None})
    totals = [
        make_plan(config_of(LARGE, **layout, parallel__offload_optimizer=where), 32000, Question(Cluster(4, 8, cpu)))
        for where in ("none", "cpu")
    ]
    assert totals[0].memory.total <= totals[1].memory.total and totals[1].memory.host_total == 0


@RELAXED
@given(LAYOUTS, st.floats(10, 800))
def test_a_slower_network_takes_no_less_time(layout: dict, gbps: float) -> None:
    from moe_train.plan.devices import find_device

    config = config_of(LARGE, **layout)
    times = [
        make_plan(config, 32000, Question(Cluster(4, 8, find_device("h100", rate)))).step.seconds
        for rate in (gbps, gbps / 4)
    ]
    assert times[0] <= times[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_hold_less_of_the_optimizer(stage: int) -> None:
    held = [
        planned(nodes=nodes, parallel__zero_stage=stage, train__global_batch_size=1024).memory.states.optimizer_states
        for nodes in (1, 4, 16)
    ]
    assert held[0] == pytest.approx(4 * held[1], rel=0.01) and held[1] == pytest.approx(4 * held[2], rel=0.01)


def test_parameters_are_counted_as_everywhere() -> None:
    plan = planned()
    assert plan.shape.parameters == count_parameters(plan.config.model, 32000)


def test_keys_and_values_of_decoding() -> None:
    plan = planned(decoding=Decoding(8, 1024))
    assert plan.memory.parts["kv_cache"] == 2 * 8 * 1024 * 16 * 4 * 128 * 2


def test_products_are_interpolated_between_those_measured() -> None:
    products = tuple(
        Product(rows=rows, width=width, flops_per_second=rows * width * 1e6)
        for rows in (16, 256)
        for width in (64, 256)
    )
    machine = DEVICES["h100"].model_copy(update={"products": {"bf16": products}, "memory_bytes_per_second": 1e30})
    rates = Rates(machine, "bf16")
    for rows, width in ((16, 64), (64, 128), (256, 256)):  # rates are a power law: logarithms interpolate it exactly
        assert rates.product(rows, width, width) == pytest.approx(2 * width / 1e6)
    assert rates.product(4096, 256, 256) == pytest.approx(2 * 4096 * 256**2 / (256 * 256 * 1e6))
