"""Seconds of single terms against sums by hand: gathered weights, two hops, products of experts, the host's time."""

import pytest

from moe_train.config.machine import Link, Network
from moe_train.plan.devices import DEVICES
from moe_train.plan.layout import Cluster
from moe_train.plan.planner import Plan, Question, make_plan
from tests.plan.cases import LARGE, config_of

T, D, F, E, K, LAYERS, ACCUMULATION = 4096, 2048, 1024, 64, 8, 16, 4
FAST, SLOW = 100e9, 10e9


def network(rate: float) -> Network:
    link = Link(latency_seconds=0.0, bytes_per_second=rate)
    return Network(all_to_all=link, all_reduce=link, all_gather=link)


def on_two_links(nodes: int = 4, free: bool = True, **changes: object) -> Plan:
    """A plan on a machine of two links without latency, whose host and memory take no time where `free`."""
    update = {"intra_node": network(FAST), "inter_node": network(SLOW)}
    if free:
        update |= {"operation_seconds": 0.0, "memory_bytes_per_second": 1e30}
    machine = DEVICES["h100"].model_copy(update=update)
    return make_plan(config_of(LARGE, **changes), 32000, Question(Cluster(nodes, 8, machine)))


def test_weights_that_stage_three_gathers() -> None:
    plan = on_two_links(parallel__zero_stage=3, parallel__expert_parallel_size=8)
    # bf16; rings over 32 ranks of 4 nodes, and over the 4 ranks with the same experts, one on each node.
    experts = 2 * LAYERS * (E // 8) * 3 * D * F
    large = 2 * (LAYERS * (2 * D * D + 2 * D * 512 + D * E) + 2 * 32000 * D)
    small = 2 * (2 * LAYERS + 1) * D
    # Less than 500 M elements stay from the forward to the backward pass; norms are gathered once in a step.
    again = 2 - (5e8 + experts / 2 / LAYERS + (2 * D * D + 2 * D * 512 + D * E) + 2 * D) / ((experts + large) / 2)
    dense_bytes = 31 / 32 * (ACCUMULATION * again * large + small)
    assert plan.layout.accumulation == ACCUMULATION
    seconds = max(dense_bytes / 8 / SLOW, dense_bytes * 7 / 8 / FAST) + 3 / 4 * ACCUMULATION * again * experts / SLOW
    assert plan.step.terms["weight_gathering"] == pytest.approx(seconds, rel=0.002)


def test_hidden_copies_pass_the_blocks_and_not_the_head() -> None:
    layout = {"parallel__expert_parallel_size": 8, "parallel__chunks": 1}
    plain, twice = (on_two_links(free=False, model__hidden_copies__copies=n, **layout) for n in (1, 2))
    assert twice.layout.tokens == 2 * plain.layout.tokens and twice.layout.predictions == plain.layout.tokens
    assert twice.step.terms["head_and_loss"] == plain.step.terms["head_and_loss"]
    for term in ("attention", "experts"):
        assert twice.step.terms[term] == pytest.approx(2 * plain.step.terms[term], rel=0.05)
    sent = [plan.traffic.parts["all_to_all_forward"].total for plan in (plain, twice)]
    assert sent[1] == pytest.approx(2 * sent[0], rel=1e-5)  # counts of rows are not more
    for part in ("weights", "optimizer_states"):
        assert twice.memory.parts[part] == plain.memory.parts[part]
    assert twice.memory.parts["activations"] > 1.7 * plain.memory.parts["activations"]


def two_level(chunks: int) -> Plan:
    changes = {"parallel__expert_parallel_size": 32, "parallel__dispatch": "two_level", "parallel__chunks": chunks}
    return on_two_links(parallel__zero_stage=1, **changes)


def test_the_hops_of_two_level_follow_each_other() -> None:
    plan, parts = two_level(1), two_level(1).traffic.parts
    sent = [parts[f"all_to_all_{way}"] for way in ("forward", "backward")]
    seconds = sum(each.intra_node / FAST + each.inter_node / SLOW for each in sent)
    assert plan.step.terms["all_to_all"] == pytest.approx(seconds) and plan.step.hidden == 0


def test_chunks_hide_only_the_hop_across_nodes() -> None:
    plan = two_level(4)
    parts = [plan.traffic.parts[f"all_to_all_{way}"] for way in ("forward", "backward")]
    across, inside = (sum(part.inter_node for part in parts) / SLOW, sum(part.intra_node for part in parts) / FAST)
    assert 0 < plan.step.hidden <= 3 / 4 * min(across, plan.step.terms["experts"]) * (1 + 1e-9)
    assert plan.step.terms["all_to_all"] >= inside + across / 4


def test_products_of_experts_are_six_times_their_weights_and_rows() -> None:
    rows = T * K / (E // 8)  # of an expert: those of 8 ranks, for 8 experts each
    share = 0.75  # of the peak, less by each dimension
    for size in (rows, D, 2 * F):
        share *= size / (size + 128)
    narrow = 0.75
    for size in (rows, D, F):
        narrow *= size / (size + 128)
    flops = 6 * T * K * D * F  # forward and both gradients of a [rows, D] x [D, F]
    seconds = LAYERS * ACCUMULATION * (2 * flops / share + flops / narrow) / 989e12
    found = on_two_links(parallel__expert_parallel_size=8, parallel__chunks=1).step.terms["experts"]
    assert found == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gpu_works_while_its_host_launches_what_zero_does(stage: int) -> None:
    slow = [
        on_two_links(free=False, parallel__zero_stage=stage, train__micro_batch_size=size).step.terms for size in (1, 8)
    ]
    assert slow[1]["operations"] == 0  # long products hide all of the host's time
    config = config_of(LARGE, parallel__zero_stage=stage, parallel__expert_parallel_size=1)
    hosts = []
    for device in ("cuda", "cpu"):
        for seconds in (0.0, 1e-3):
            changes = {"device": device, "operation_seconds": seconds}
            machine = DEVICES["h100"].model_copy(update=changes)
            hosts.append(make_plan(config, 32000, Question(Cluster(4, 8, machine))).step.terms)
    free, late, cpu_free, cpu_late = hosts
    for term in ("gradient_reduction", "weight_gathering"):
        assert late[term] == free[term]
    assert cpu_late["gradient_reduction"] > cpu_free["gradient_reduction"]
    assert (cpu_late["weight_gathering"] > cpu_free["weight_gathering"]) is (stage == 3)
    assert late["operations"] > free["operations"] == 0
