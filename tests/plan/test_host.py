"""Memory of the host and copies to it by hand, and layouts that need them."""

import pytest

from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.root import Config
from moe_train.plan.devices import DEVICES
from moe_train.plan.host import host_copies, host_parts
from moe_train.plan.layout import Cluster
from moe_train.plan.planner import Plan, Question, make_plan
from moe_train.plan.report import verdict
from moe_train.plan.search import apply_layout, search
from tests.plan.cases import LARGE, ROOT, config_of, planned

# Of a smaller batch, which has fewer layouts to search.
QWEN3 = load_config(
    ["--config", str(ROOT / "configs" / "qwen3_30b_a3b.yaml"), "--train.global_batch_size=32"], program="test"
)
VOCABULARY = 151936
NODE = Cluster(1, 8, DEVICES["h100"])


def offloaded(**changes: object) -> Plan:
    return planned(parallel__offload_optimizer="cpu", **changes)


@pytest.mark.parametrize(
    ("changes", "per_element"),
    [
        # Weights in fp32, two moments, gradient, and weights as the device has them; copies: gradient, weights.
        ({"parallel__zero_stage": 1}, (18, 4, 2)),
        ({"parallel__zero_stage": 2}, (18, 4, 2)),
        # fp32 weights are as wide as the sums, which go to and fro for each of 4 passes.
        ({"parallel__zero_stage": 2, "train__precision": "fp32"}, (24, 4 + 4 * 4, 4 + 3 * 4)),
        # Stage 3 has the sums of gradients there, and no copy of the weights.
        ({"parallel__zero_stage": 3}, (20, 4 + 4 * 4, 2 + 4 * 4)),
    ],
)
def test_bytes_by_hand(changes: dict, per_element: tuple[int, int, int]) -> None:
    plan = offloaded(**changes)
    assert plan.layout.accumulation == 4
    states, own = plan.memory.states, plan.memory.states.partition_elements
    held, to_host, to_device = (number * own for number in per_element)
    buffer = plan.layout.dtype_bytes * max(group.largest for group in states.groups)
    parts = host_parts(states, plan.layout, "cpu")
    assert sum(parts.values()) == held + (0 if plan.layout.zero_stage == 3 else buffer)
    copies = host_copies(states, plan.layout)
    assert (copies.to_host, copies.to_device) == (to_host, to_device)
    pinned = host_parts(states, plan.layout, "cuda")  # blocks are rounded up to powers of two
    snapshot = states.optimizer_states
    assert pinned["checkpoint"] == snapshot
    assert sum(parts.values()) < sum(pinned.values()) - snapshot < 2 * sum(parts.values())


def test_a_faster_link_takes_less_time() -> None:
    host = DEVICES["h100"].host
    assert host is not None
    seconds = []
    for factor in (1, 2):
        faster = host.model_copy(update={"link_bytes_per_second": factor * host.link_bytes_per_second})
        machine = DEVICES["h100"].model_copy(update={"host": faster})
        config = config_of(LARGE, parallel__offload_optimizer="cpu")
        seconds.append(make_plan(config, 32000, Question(Cluster(4, 8, machine))).step.terms["host_copies"])
    assert seconds[0] == pytest.approx(2 * seconds[1])


@pytest.fixture(scope="module")
def offloading() -> Config:
    """Thirty billion parameters in the layout that a search finds on one node."""
    found = search(QWEN3, VOCABULARY, Question(NODE, margin=0.05))
    assert found.best and all(each.layout.offloads for each in found.best)
    return apply_layout(QWEN3, found.best[0].layout)


def test_thirty_billion_parameters_on_one_node(offloading: Config) -> None:
    plan = make_plan(offloading, VOCABULARY, Question(NODE))
    assert plan.fits and plan.memory.total <= 0.95 * 80e9 and plan.config.parallel.offload_optimizer == "cpu"
    assert 8 * plan.memory.host_total <= 0.95 * 2e12


def test_offload_is_not_taken_where_it_is_not_needed() -> None:
    found = search(config_of(LARGE), 32000, Question(Cluster(4, 8, DEVICES["h200"])))
    assert not any(each.layout.offloads for each in found.best)


@pytest.mark.slow  # a whole search
def test_a_host_that_is_too_small(offloading: Config) -> None:
    host = DEVICES["h100"].host
    assert host is not None
    small = DEVICES["h100"].model_copy(update={"host": host.model_copy(update={"memory_bytes": 2**38})})
    question = Question(Cluster(1, 8, small))
    plan = make_plan(offloading, VOCABULARY, question)
    assert not plan.fits and "GiB a rank in the memory of the host (" in verdict(plan)
    assert plan.memory.total <= plan.capacity
    assert not any(each.layout.offloads for each in search(QWEN3, VOCABULARY, question).best)


@pytest.mark.slow  # a whole search
def test_a_host_of_which_nothing_is_known() -> None:
    unknown = DEVICES["h100"].model_copy(update={"host": None})
    with pytest.raises(
        UsageError, match=r"parallel\.offload_optimizer \(cpu\): nothing is known of the host of NVIDIA"
    ):
        make_plan(config_of(LARGE, parallel__offload_optimizer="cpu"), 32000, Question(Cluster(4, 8, unknown)))
    assert make_plan(config_of(LARGE), 32000, Question(Cluster(4, 8, unknown))).question.host_capacity is None
    # A search does without.
    found = search(QWEN3, VOCABULARY, Question(Cluster(1, 8, unknown), margin=0.05))
    assert found.best == () and found.tried > 0


@pytest.mark.slow  # a whole search
def test_muon_stays_on_the_devices() -> None:
    with pytest.raises(
        UsageError, match=r"parallel\.offload_optimizer \(cpu\) does not work with optim\.name \('muon'\)"
    ):
        offloaded(optim__name="muon")
    muon = QWEN3.model_copy(update={"optim": QWEN3.optim.model_copy(update={"name": "muon"})})
    assert not any(each.layout.offloads for each in search(muon, VOCABULARY, Question(NODE, margin=0.05)).best)
