"""The search: what it proposes fits, is no slower than what was asked, keeps the global batch and can be loaded."""

import itertools
from typing import get_args

import pytest
import yaml

from moe_train.config.load import dump_yaml, validate_config
from moe_train.config.run import RecomputedPart
from moe_train.model.block import NO_RECOMPUTE, Recompute
from moe_train.plan.devices import DEVICES
from moe_train.plan.layout import Cluster
from moe_train.plan.planner import Question, make_plan
from moe_train.plan.search import apply_layout, search
from tests.plan.cases import LARGE, SMALL, config_of
from tests.resolved import resolve_for


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (4, 8), (2, 4)])
def test_the_best_is_fast_fits_and_loads(nodes: int, gpus: int) -> None:
    config = config_of(LARGE, parallel__zero_stage=3, train__recompute="block")
    question = Question(Cluster(nodes, gpus, DEVICES["h100"]), margin=0.05)
    found = search(config, 32000, question)
    chosen = apply_layout(config, found.best[0].layout)
    loaded = validate_config(yaml.safe_load(dump_yaml(chosen)))
    resolved = resolve_for(loaded, nodes * gpus, gpus)
    assert resolved.train.global_batch_size == 256
    plan, asked = make_plan(loaded, 32000, question), make_plan(config, 32000, question)
    assert plan.fits and plan.step.seconds <= asked.step.seconds
    assert plan.step.seconds == pytest.approx(found.best[0].step.seconds)
    assert plan.memory.total == pytest.approx(found.best[0].memory.total)
    times = [candidate.step.seconds for candidate in found.best]
    assert times == sorted(times)
    # All layouts by hand: three stages, sizes that divide both, divisors of the share, ways of dispatch.
    assert found.tried >= _layouts(nodes, gpus)


def _layouts(nodes: int, gpus: int) -> int:
    world = nodes * gpus
    micros = sum(256 // world % size == 0 for size in range(1, 65))
    ways = {size: 1 if size == 1 else 9 if size > gpus and size % gpus == 0 else 6 for size in (1, 2, 4, 8, 16, 32)}
    return 3 * micros * sum(number for size, number in ways.items() if world % size == 0)


def test_no_layout_is_faster_than_the_best() -> None:
    config = config_of(LARGE, train__global_batch_size=64)
    question = Question(Cluster(2, 8, DEVICES["h100"]), margin=0.2)
    best = search(config, 32000, question).best[0]
    times = []
    for size, stage, micro, again, dispatch in itertools.product(
        (1, 8, 16), (1, 3), (1, 4), get_args(RecomputedPart), ("flat", "unique")
    ):
        changes = {"expert_parallel_size": size, "zero_stage": stage, "dispatch": dispatch, "chunks": 1}
        train = {"micro_batch_size": micro, "recompute": again}
        parallel = config.parallel.model_copy(update=changes)
        tried = config.model_copy(update={"parallel": parallel, "train": config.train.model_copy(update=train)})
        plan = make_plan(tried, 32000, question)
        times += [plan.step.seconds] if plan.fits else []
    assert len(times) > 10 and best.step.seconds <= min(times) * (1 + 1e-9)


def test_micro_batches_are_all_divisors_and_a_payload_goes_with_its_traffic() -> None:
    config = config_of(LARGE, train__global_batch_size=8 * 12, parallel__payload="fp8")
    found = search(config, 32000, Question(Cluster(1, 8, DEVICES["h200"])))
    assert {each.layout.micro_batch for each in found.best} == {1, 2, 3, 4, 6, 12}
    alone = next(each.layout for each in found.best if each.layout.ep_size == 1)
    assert apply_layout(config, alone).parallel.payload == "model"
    shared = next(each.layout for each in found.best if each.layout.ep_size == 8)
    assert apply_layout(config, shared).parallel.payload == "fp8"


def test_no_more_is_recomputed_than_must_be() -> None:
    config = config_of(LARGE, train__global_batch_size=64, parallel__zero_stage=1)
    parts = {}
    for margin in (0.0, 0.4):
        found = search(config, 32000, Question(Cluster(1, 8, DEVICES["h100"]), margin=margin))
        parts[margin] = {each.layout.recompute for each in found.best}
    assert Recompute("none") in parts[0.0]
    for way in (Recompute("attention", 2), Recompute("experts"), Recompute("experts", 4), Recompute("block")):
        assert way in parts[0.4], way


def test_every_candidate_fits_with_its_margin() -> None:
    question = Question(Cluster(1, 8, DEVICES["h100"]), margin=0.3)
    found = search(config_of(LARGE), 32000, question)
    assert found.best and all(each.memory.total <= 0.7 * 80e9 for each in found.best)


def test_a_model_without_experts() -> None:
    dense = {name: value for name, value in SMALL.items() if ".moe." not in name}
    config = config_of(dense | {"model.moe_every": 0}, train__global_batch_size=16)
    found = search(config, 512, Question(Cluster(1, 2, DEVICES["a100"])))
    assert {each.layout.ep_size for each in found.best} == {1}


def test_nothing_fits() -> None:
    small = DEVICES["h100"].model_copy(update={"memory_bytes": 2**30})
    found = search(config_of(LARGE), 32000, Question(Cluster(1, 8, small)))
    assert found.best == () and found.smallest.total > 2**30


LONG = {"train__sequence_length": 131072, "train__global_batch_size": 8}


def test_ranks_share_sequences_only_where_too_little_fits_without() -> None:
    question = Question(Cluster(1, 8, DEVICES["h100"]))
    assert {each.layout.context_size for each in search(config_of(LARGE), 32000, question).best} == {1}
    config = config_of(LARGE, **LONG)
    found = search(config, 32000, question)
    sizes = {each.layout.context_size for each in found.best}
    assert len(sizes) > 1 and found.best[0].layout.context_size > 1
    plain = {each.layout.context_size for each in found.best if each.layout.recompute == NO_RECOMPUTE}
    assert plain == {max(sizes)}  # the smallest that needs no recomputation is the last that is tried
    chosen = apply_layout(config, found.best[0].layout)
    plan = make_plan(validate_config(yaml.safe_load(dump_yaml(chosen))), 32000, question)
    assert plan.config.train.global_batch_size == 8 and plan.fits
    assert plan.step.seconds == pytest.approx(found.best[0].step.seconds)


def test_fewer_sequences_than_ranks_are_shared() -> None:
    config = config_of(LARGE, train__sequence_length=32768, train__global_batch_size=2, parallel__zero_stage=3)
    found = search(config, 32000, Question(Cluster(1, 8, DEVICES["h100"])))
    assert found.best and {each.layout.context_size for each in found.best} <= {4, 8}
    assert all(
        each.layout.micro_batch * each.layout.accumulation * 8 // each.layout.context_size == 2 for each in found.best
    )


def test_a_model_that_cannot_share_sequences_does_not() -> None:
    config = config_of(LARGE, **LONG, model__moe__capacity_factor=1.5)
    found = search(config, 32000, Question(Cluster(1, 8, DEVICES["h200"])))
    assert {each.layout.context_size for each in found.best} <= {1}


def test_a_given_exchange_goes_with_ranks_that_share() -> None:
    changes = {"parallel__context_parallel_size": 2, "parallel__context_exchange": "ring"}
    question = Question(Cluster(1, 8, DEVICES["h100"]))
    long, short = config_of(LARGE, **LONG, **changes), config_of(LARGE, **changes)
    shared = next(each for each in search(long, 32000, question).best if each.layout.context_size > 1)
    assert apply_layout(long, shared.layout).parallel.context_exchange == "ring"
    alone = apply_layout(short, search(short, 32000, question).best[0].layout)
    assert alone.parallel.context_parallel_size == 1 and alone.parallel.context_exchange == "all_gather"
