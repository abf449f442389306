"""Model states, peak memory and bytes of the plan, all-to-alls' and ZeRO's, against real engines on gloo ranks."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plan_check.memory import make_batches, size_of, state_bytes
from benchmarks.runner.peak import STEP, peak_bytes
from moe_train.config.load import load_config
from moe_train.distributed.observer import CommObserver
from moe_train.distributed.traffic import TrafficMeter
from moe_train.plan.devices import DEVICES
from moe_train.plan.host import host_parts
from moe_train.plan.layout import Cluster
from moe_train.plan.planner import Question, make_plan
from moe_train.train.engine.engine import TrainEngine
from tests.plan.cases import SMALL, VOCAB, options
from tests.ranks import RankPool
from tests.resolved import resolve_for

CPU = DEVICES["h100"].model_copy(update={"device": "cpu"})
LONG = {"train.sequence_length": 1024, "train.micro_batch_size": 1, "train.recompute": "block"}
OFFLOADS = {"parallel.offload_optimizer": "cpu"}
CASES = [
    (1, {"parallel.zero_stage": 1}),
    (1, {"parallel.zero_stage": 2, "train.global_batch_size": 8, "train.precision": "bf16"}),
    (1, {"parallel.zero_stage": 3, "train.recompute": "block", "train.micro_batch_size": 8}),
    (2, {"parallel.zero_stage": 1, "parallel.expert_parallel_size": 2, "train.global_batch_size": 16}),
    (2, {"parallel.zero_stage": 2, "parallel.expert_parallel_size": 1, "train.precision": "bf16"}),
    (2, {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 2, "parallel.dispatch": "unique"}),
    (1, {"train.loss_chunk_tokens": 64, "model.vocab_size": 4096, "train.micro_batch_size": 16, "model.moe_every": 0}),
    (4, {"parallel.zero_stage": 2, "parallel.expert_parallel_size": 2, "parallel.chunks": 2}),
    (4, {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 2, "model.tie_embeddings": True}),
    (
        4,
        {
            "parallel.expert_parallel_size": 4,
            "parallel.dispatch": "two_level",
            "parallel.ranks_per_node": 2,
            "train.recompute": "block",
        },
    ),
    (2, {"parallel.context_parallel_size": 2, "parallel.expert_parallel_size": 1, **LONG}),
    (4, {"parallel.context_parallel_size": 4, "parallel.context_exchange": "ring", "parallel.zero_stage": 3, **LONG}),
    (
        2,
        {"parallel.context_parallel_size": 2, "parallel.context_exchange": "gather_once", "model.kv_layers": 2, **LONG},
    ),
    (2, {"parallel.zero_stage": 2, "parallel.expert_parallel_size": 2, "train.precision": "bf16", **OFFLOADS}),
    (1, {"parallel.zero_stage": 1, **OFFLOADS}),
    (1, {"parallel.zero_stage": 2, "train.global_batch_size": 8, "train.precision": "bf16", **OFFLOADS}),
    (2, {"parallel.zero_stage": 2, "train.global_batch_size": 16, **OFFLOADS}),
    (2, {"parallel.zero_stage": 1, "train.global_batch_size": 16, "train.precision": "bf16", **OFFLOADS}),
    (2, {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 2, **OFFLOADS}),
    (4, {"parallel.zero_stage": 3, "train.global_batch_size": 32, "train.precision": "bf16", **OFFLOADS}),
    (4, {"parallel.zero_stage": 2, "parallel.expert_parallel_size": 2, "train.recompute": "block", **OFFLOADS}),
    (
        2,
        {
            "parallel.context_parallel_size": 2,
            "parallel.context_exchange": "ring",
            **LONG,
            "train.recompute": "attention",
        },
    ),
    (1, {"train.precision": "bf16", "train.micro_batch_size": 16, "model.moe_every": 1, "train.recompute": "experts"}),
    (1, {"train.micro_batch_size": 16, "model.kv_layers": 2, "train.recompute": "block", "train.recompute_every": 2}),
    (1, {"train.micro_batch_size": 16, "train.recompute": "attention", "train.recompute_every": 2}),
    (2, {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 2, "train.recompute": "experts"}),
    (1, {"parallel.zero_stage": 1, "optim.name": "muon"}),
    (2, {"parallel.zero_stage": 2, "train.precision": "bf16", "optim.name": "muon"}),
    (2, {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 2, "optim.name": "muon"}),
]
ALWAYS = (3, 13, len(CASES) - 1)  # by `make test`; the others, of each stage and number of ranks, take a minute


def run_steps(rank: int, world_size: int, given: list[str]) -> dict[str, int]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    from moe_train.train.engine.build import make_engine, sharing_ranks

    config, device = resolve_for(load_config(given, program="test"), world_size), torch.device("cpu")
    keys = TrafficMeter(device)
    meter, kinds = TrafficMeter(device), [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profile:
        engine = make_engine(config, device, meter)
        sharing = sharing_ranks(config, engine.mesh)
        if sharing is not None:
            sharing = replace(sharing, observer=CommObserver(keys))
        for step in range(2):
            batches = make_batches(config, rank, world_size, step, sharing)
            meter.reset()
            keys.reset()
            with meter.counting(), keys.counting(), torch.profiler.record_function(STEP):
                engine.train_step(batches, size_of(config), 1e-4)
    return {
        "states": state_bytes(engine),
        "peak": peak_bytes(profile),
        "host": host_bytes(engine),
        "bytes": meter.read().num_bytes,
        "keys": keys.read().num_bytes,
    }


def host_bytes(engine: TrainEngine) -> int:
    """Bytes of the storages that DeepSpeed would have in the memory of a GPU's host."""
    zero: Any = engine._zero
    masters = [
        *getattr(zero, "single_partition_of_fp32_groups", ()),
        *getattr(zero, "fp32_partitioned_groups_flat", ()),
    ]
    tensors = [*masters, *(master.grad for master in masters)]
    tensors += [value for state in zero.optimizer.state.values() for value in state.values()]
    tensors += [
        *getattr(zero, "accumulated_grads_in_cpu", {}).values(),
        getattr(zero, "grad_partitions_flat_buffer", None),
    ]
    tensors += getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    tensors.append(getattr(zero, "temp_grad_buffer_for_cpu_offload", None))
    storages = [tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [pytest.param(*case, marks=() if number in ALWAYS else pytest.mark.slow) for number, case in enumerate(CASES)],
)
def test_states_peak_and_all_to_all_bytes(ranks: int, changes: dict, request: pytest.FixtureRequest) -> None:
    given = options(SMALL, changes)
    found = request.getfixturevalue(f"pool{ranks}").run(run_steps, given, timeout=120)
    plan = make_plan(load_config(given, program="test"), VOCAB, Question(Cluster(1, ranks, CPU)))
    states = plan.memory.states
    # Adam's step counters are 4 bytes a group; what is not the same on all ranks is padding.
    assert states.weights + states.optimizer_states == pytest.approx(max(each["states"] for each in found), rel=0.001)
    peak = max(each["peak"] for each in found)
    assert plan.memory.total == pytest.approx(peak, rel=0.15)
    if plan.layout.offloads:
        in_host = sum(host_parts(states, plan.layout, "cpu").values())
        assert in_host == pytest.approx(max(each["host"] for each in found), rel=0.001)
        # On this CPU the peak has both; what a GPU would hold is the rest.
        on_device = max(each["peak"] - each["host"] for each in found)
        assert plan.memory.total - in_host == pytest.approx(on_device, rel=0.15)
    parts = plan.traffic.parts
    sent = parts["all_to_all_forward"].total + parts["all_to_all_backward"].total
    # Routing is random: a few percent of the expected rows for so few tokens.
    assert sent == pytest.approx(sum(each["bytes"] for each in found) / ranks, rel=0.03)
    assert [each["keys"] for each in found] == [parts["key_value_exchange"].total] * ranks


@pytest.mark.slow
def test_activations_fall_where_ranks_share_sequences(pool1: RankPool, pool2: RankPool) -> None:
    activations = []
    for ranks, pool in ((1, pool1), (2, pool2)):
        changes = {"parallel.context_parallel_size": ranks, "parallel.expert_parallel_size": 1, **LONG}
        given = options(SMALL, changes | {"train.sequence_length": 4096})
        peak = max(each["peak"] for each in pool.run(run_steps, given, timeout=200))
        memory = make_plan(load_config(given, program="test"), VOCAB, Question(Cluster(1, ranks, CPU))).memory
        assert memory.moment.startswith("backward of block")
        activations.append(peak - (memory.total - memory.parts["activations"]))
    assert activations[0] >= 1.6 * activations[1], activations


class RingBytes(TorchDispatchMode):
    """Counts what each rank of a ring sends for ZeRO's collective operations; sums of a few numbers are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = {"gradient_reduction": 0.0, "weight_gathering": 0.0}

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        parts = {"allreduce_": 2, "_reduce_scatter_base_": 1, "_allgather_base_": 1}
        name = op.__name__.partition(".")[0]
        if op.namespace == "c10d" and name in parts:
            tensors = [each for arg in args[:2] for each in (arg if isinstance(arg, list | tuple) else [arg])]
            whole = max((each.nbytes for each in tensors if torch.is_tensor(each)), default=0)
            if whole >= LEAST_BYTES:
                size = next(s for s in map(_group_size, args) if s)
                part = "weight_gathering" if name == "_allgather_base_" else "gradient_reduction"
                self.sent[part] += parts[name] * (size - 1) / size * whole
        return op(*args, **(kwargs or {}))


LEAST_BYTES = 128  # a norm's gather in bf16 is the smallest; sums over experts and of norms are of 64 bytes and less


def _group_size(argument: Any) -> int:
    """Of the group's script object among the arguments of an operation; 0: it is another argument."""
    return dist.ProcessGroup.unbox(argument).size() if "ProcessGroup" in str(argument) else 0


def count_zero_bytes(rank: int, world_size: int, given: list[str]) -> dict[str, float]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    from moe_train.train.engine.build import make_engine

    config, device = resolve_for(load_config(given, program="test"), world_size), torch.device("cpu")
    engine = make_engine(config, device, TrafficMeter(device))
    for step in range(3):  # stage 3 goes by its record of the first step, and gathers as it will from the third on
        with RingBytes() as counted:
            engine.train_step(make_batches(config, rank, world_size, step), size_of(config), 1e-4)
    return counted.sent


ACCUMULATES = {"train.global_batch_size": 32}
ZERO_CASES = [
    pytest.param(2, {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 1, "train.global_batch_size": 16}),
    pytest.param(4, {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 2}, marks=pytest.mark.slow),
    pytest.param(
        4, {"parallel.zero_stage": 2, "parallel.expert_parallel_size": 2} | ACCUMULATES, marks=pytest.mark.slow
    ),
    pytest.param(
        4,
        {"parallel.zero_stage": 1, "parallel.expert_parallel_size": 2, "train.precision": "bf16"} | ACCUMULATES,
        marks=pytest.mark.slow,
    ),
    *(
        pytest.param(
            2,
            {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 2, "train.recompute": part},
            marks=pytest.mark.slow,
        )
        for part in ("attention", "experts", "block")
    ),
]


@pytest.mark.parametrize(("ranks", "changes"), ZERO_CASES)
def test_bytes_of_zero(ranks: int, changes: dict, request: pytest.FixtureRequest) -> None:
    given = options(SMALL, changes)
    found = request.getfixturevalue(f"pool{ranks}").run(count_zero_bytes, given, timeout=120)
    parts = make_plan(load_config(given, program="test"), VOCAB, Question(Cluster(1, ranks, CPU))).traffic.parts
    for part in ("gradient_reduction", "weight_gathering"):
        # Padding of partitions is less than a thousandth.
        assert parts[part].total == pytest.approx(max(each[part] for each in found), rel=0.03), part
