"""One rank of benchmarks/plan_check.py: a few real steps under DeepSpeed, with every byte that torch allocates counted.

    python benchmarks/plan_check_rank.py FOLDER STEPS [options of moe-train train]

The engine, the model and the steps are the trainer's; tokens are random. torch.profiler reports every allocation of the
CPU's allocator, so that the most bytes at one time are what torch.cuda.max_memory_allocated would be on a GPU. Each
rank writes what it found to FOLDER/RANK.json.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._C._profiler import _EventType  # noqa: E402

from moe_train.config.load import load_config  # noqa: E402
from moe_train.config.root import Config, check_world  # noqa: E402
from moe_train.distributed.bootstrap import discover_world, init_process_group  # noqa: E402
from moe_train.distributed.collectives import barrier  # noqa: E402
from moe_train.distributed.traffic import TrafficMeter  # noqa: E402
from moe_train.model.transformer import Tokens  # noqa: E402
from moe_train.train.engine.build import make_engine  # noqa: E402
from moe_train.train.engine.engine import TrainEngine  # noqa: E402
from moe_train.train.engine.settings import deepspeed_config  # noqa: E402

_STEP = "plan_check/step"
_LEARNING_RATE = 1e-4


def main(folder: Path, num_steps: int, options: list[str]) -> None:
    """Measure and write."""
    world = discover_world()
    config = load_config(options, program="plan_check_rank")
    config = check_world(config, world.world_size, world.local_world_size)
    device = torch.device("cpu")
    torch.set_num_threads(1)
    init_process_group(world, device, config.parallel.timeout_seconds)
    precision = config.train.precision
    assert precision != "auto"
    meter = TrafficMeter(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profile:
        engine = make_engine(config, deepspeed_config(config, world.world_size, precision), device, meter)
        for step in range(num_steps):
            batches = make_batches(config, world.rank, world.world_size, step)
            meter.reset()
            with meter.counting(), torch.profiler.record_function(_STEP):
                engine.train_step(batches, _LEARNING_RATE)
    found = {"states": state_bytes(engine), "peak": peak_bytes(profile), "all_to_all": meter.read().num_bytes}
    (folder / f"{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    barrier()


def make_batches(config: Config, rank: int, world_size: int, step: int) -> list[tuple[Tokens, torch.Tensor]]:
    """Random tokens of this rank for one step."""
    micro, batch, length = config.train.micro_batch_size, config.train.global_batch_size, config.train.sequence_length
    assert isinstance(micro, int) and batch is not None and config.model.vocab_size is not None
    draws, found = torch.Generator().manual_seed(1000 * step + rank), []
    for number in range(batch // (micro * world_size)):
        ids = torch.randint(0, config.model.vocab_size, (micro, length + 1), generator=draws)
        sequences_B = torch.arange(micro) + micro * (rank + world_size * number)
        found.append((Tokens(ids[:, :-1].contiguous(), sequences_B, step), ids[:, 1:].contiguous()))
    return found


def state_bytes(engine: TrainEngine) -> int:
    """Working weights, fp32 master weights and moments of this rank: the storages that hold them."""
    zero: Any = engine._zero
    parameters = list(engine.model.parameters())
    if engine._stage == 3:
        weights = [parameter.ds_tensor for parameter in parameters] + [parameter.data for parameter in parameters]
        masters = list(zero.fp32_partitioned_groups_flat)
    else:
        weights, masters = list(zero.bit16_groups_flat), list(zero.single_partition_of_fp32_groups)
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    tensors = [tensor for tensor in [*weights, *masters, *states] if torch.is_tensor(tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # many are views of one


def peak_bytes(profile: Any) -> int:
    """The most bytes at one time in any step but the first, in which the optimizer's states are made.

    What gloo's threads free is not reported (torch 2.13): such a block is taken to be free when its address is given
    out again.
    """
    results = profile.profiler.kineto_results
    steps = sorted((event.start_ns(), event.end_ns()) for event in results.events() if event.name() == _STEP)[1:]
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
    """Of a tree of events: when, address, bytes; negative where it is freed."""
    left = list(events)
    while left:
        event = left.pop()
        left.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
