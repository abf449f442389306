"""A rank of the plan_check benchmark: a few real steps under DeepSpeed, with every byte that torch allocates counted.

    python -m benchmarks.plan_check.memory FOLDER STEPS [options of moe-train train]

The engine, the model and the steps are the trainer's; tokens are random. torch.profiler reports every allocation of the
CPU's allocator, so that the most bytes at one time are what torch.cuda.max_memory_allocated would be on a GPU. Each
rank writes what it found to FOLDER/RANK.json.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.runner.peak import STEP, peak_bytes
from benchmarks.runner.resolved import resolve_for
from moe_train.config.load import load_config
from moe_train.config.resolve import ResolvedConfig
from moe_train.distributed.bootstrap import discover_world, init_process_group
from moe_train.distributed.collectives import barrier
from moe_train.distributed.context import ContextRanks
from moe_train.distributed.traffic import TrafficMeter
from moe_train.model.step_size import StepSize
from moe_train.model.transformer import Tokens
from moe_train.train.batches import make_tokens, own_targets
from moe_train.train.engine.build import make_engine, sharing_ranks
from moe_train.train.engine.engine import TrainEngine

_LEARNING_RATE = 1e-4


def main(arguments: Sequence[str]) -> int:
    """Measure; each rank writes RANK.json into the folder. Collective: all ranks.

    Args:
        arguments: Folder, number of steps, and options of `moe-train train`.
    """
    folder, num_steps = Path(arguments[0]), int(arguments[1])
    world = discover_world()
    config = load_config(arguments[2:], program="benchmarks.plan_check")
    config = resolve_for(config, world)
    device = torch.device("cpu")
    torch.set_num_threads(1)
    init_process_group(world, device, config.parallel.timeout_seconds)
    meter = TrafficMeter(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profile:
        engine = make_engine(config, device, meter)
        for step in range(num_steps):
            batches = make_batches(config, world.rank, world.world_size, step, sharing_ranks(config, engine.mesh))
            meter.reset()
            with meter.counting(), torch.profiler.record_function(STEP):
                engine.train_step(batches, size_of(config), _LEARNING_RATE)
    found = {"states": state_bytes(engine), "peak": peak_bytes(profile), "all_to_all": meter.read().num_bytes}
    (folder / f"{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    barrier()
    return 0


def make_batches(
    config: ResolvedConfig, rank: int, world_size: int, step: int, sharing: ContextRanks | None = None
) -> list[tuple[Tokens, torch.Tensor]]:
    """Draw random tokens for one step: this rank's, or its part of those that it shares."""
    micro, length = config.train.micro_batch_size, config.train.sequence_length
    reader = rank // config.parallel.context_parallel_size
    draws, found, device = torch.Generator().manual_seed(1000 * step + reader), [], torch.device("cpu")
    for number in range(config.accumulation):
        ids = torch.randint(0, config.model.vocab_size, (micro, length + 1), generator=draws).numpy()
        sequences_B = np.arange(micro) + micro * (reader + world_size * number)
        tokens = make_tokens(ids[:, :-1], sequences_B, step, None, device, sharing)
        found.append((tokens, own_targets(ids[:, 1:], sharing, device)))
    return found


def size_of(config: ResolvedConfig) -> StepSize:
    """Sizes of one step in which every token has a target."""
    tokens = config.train.global_batch_size * config.train.sequence_length
    return StepSize(config.accumulation * config.world_size, tokens, tokens)


def state_bytes(engine: TrainEngine) -> int:
    """Bytes of the storages that hold working weights, fp32 master weights and moments of this rank."""
    zero: Any = engine._zero
    parameters = list(engine.model.parameters())
    if hasattr(parameters[0], "ds_tensor"):  # ZeRO 3
        weights = [parameter.ds_tensor for parameter in parameters] + [parameter.data for parameter in parameters]
        masters = list(zero.fp32_partitioned_groups_flat)
    else:
        weights, masters = list(zero.bit16_groups_flat), list(zero.single_partition_of_fp32_groups)
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    tensors = [tensor for tensor in [*weights, *masters, *states] if torch.is_tensor(tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # many are views of one


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
