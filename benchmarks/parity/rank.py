"""A rank of the parity benchmark: it plants an imbalance in the routers, trains, and writes what it saw."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.parity.rows import GLOBAL_BATCH, Case, Layout, Task, Trace, write_trace
from moe_train.checkpoint.sharded_state import Fragment
from moe_train.config.load import load_config
from moe_train.config.parts import load_kinds
from moe_train.config.resolve import Device, ResolvedConfig, resolve
from moe_train.data import TrainEntry, TrainingSequences
from moe_train.distributed.bootstrap import discover_world, init_process_group, leave_process_group
from moe_train.distributed.collectives import all_reduce_sum, barrier, world_group
from moe_train.distributed.world import World
from moe_train.model.moe.balance.cv_squared import cv_squared
from moe_train.model.step_size import StepSize
from moe_train.ops.keyed_random import fill_normal_, make_key
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.engine.build import make_engine
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.progress import Progress

_DEVICE = torch.device("cpu")
_VOCAB_SIZE = 64
_SEQUENCE_LENGTH = 8
_NUM_TOKENS = 1 << 14  # of the training data
_LEARNING_RATE = 1e-3
_MAPS = ("router.gate.weight", "router.noise.weight")
_MODEL = (
    f"--model.vocab_size={_VOCAB_SIZE}",
    "--model.hidden_size=16",
    "--model.num_layers=1",
    "--model.moe_every=1",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.moe.num_experts=8",
    "--model.moe.intermediate_size=12",
    f"--train.sequence_length={_SEQUENCE_LENGTH}",
    f"--train.global_batch_size={GLOBAL_BATCH}",
    "--train.precision=fp32",
    "--train.run_dir=unused",
    "--optim.max_grad_norm=0",  # a gradient is looked at as it is
    "--parallel.device=cpu",
)


def run_rank(arguments: Sequence[str]) -> int:
    """Train the tasks one after the other; rank 0 writes a file for each.

    Args:
        arguments: Tasks as JSON, number of steps, folder for the files.

    Collective: All ranks.
    """
    tasks, num_steps, folder = json.loads(arguments[0]), int(arguments[1]), Path(arguments[2])
    world = discover_world()
    init_process_group(world, _DEVICE, 300)
    for number, values in enumerate(tasks):
        task = Task(**values | {"case": Case(**values["case"]), "layout": Layout(**values["layout"])})
        trace = _train(task, num_steps, world)
        if world.rank == 0:
            write_trace(folder / f"{number}.npz", trace)
    barrier()
    leave_process_group(0)
    return 0


def _resolve(task: Task, world: World) -> ResolvedConfig:
    layout = task.layout
    options = [
        *_MODEL,
        *task.case.options(),
        f"--parallel.expert_parallel_size={layout.expert_parallel_size}",
        f"--parallel.zero_stage={layout.zero_stage}",
        f"--train.micro_batch_size={GLOBAL_BATCH // (layout.world_size * layout.accumulation)}",
    ]
    config = load_config(options, program="benchmarks.parity")
    return resolve(config, world, Device("cpu", has_bf16=False), _VOCAB_SIZE, load_kinds(config))


def _train(task: Task, num_steps: int, world: World) -> Trace:
    config = _resolve(task, world)
    engine = make_engine(config, _DEVICE)
    _plant(engine)
    plan = BatchPlan(config.train.micro_batch_size, GLOBAL_BATCH, world.rank, world.world_size)
    tokens = np.random.default_rng(0).integers(_VOCAB_SIZE, size=_NUM_TOKENS)
    data = TrainingSequences((TrainEntry(tokens),), _SEQUENCE_LENGTH, seed=0)
    progress, beta, seen = Progress(), config.optim.beta1, []
    moments = _moments(engine)
    for _ in range(num_steps):
        size = _spoiled(plan.step_size(_SEQUENCE_LENGTH), task)
        result = engine.train_step(micro_batches(data, plan, progress, None, _DEVICE), size, _LEARNING_RATE)
        before, moments = moments, _moments(engine)
        assert result.sums is not None
        loss = all_reduce_sum(result.loss.double(), world_group()) / world.world_size
        importance = all_reduce_sum(result.sums.importance.double(), world_group())
        # Adam's first moment is a mean of gradients; two of them give the gradient that the optimizer was given.
        gradients = {name: (moments[name] - beta * before[name]) / (1 - beta) for name in moments}
        seen.append((float(loss), float(result.grad_norm), float(cv_squared(importance).mean()), gradients))
        progress = progress.after(GLOBAL_BATCH)
    engine.close()
    losses, norms, cv2, found = zip(*seen, strict=True)
    by_name = {name: np.stack([each[name].numpy() for each in found]) for name in moments}
    return Trace(np.array(losses), np.array(norms), np.array(cv2), by_name)


def _plant(engine: TrainEngine) -> None:
    """Give the routers' maps values with which some experts get far more tokens than others, the same in any layout."""

    def read(fragment: Fragment, kind: str) -> Tensor:
        name, shape = fragment.tensor.name, fragment.tensor.shape
        if kind != "weight" or not name.endswith(_MAPS):
            return fragment.states[kind].clone()
        values = torch.empty(fragment.numel)
        fill_normal_(values, make_key("planted", name), fragment.start, 1.0)
        rows = torch.arange(fragment.start, fragment.start + fragment.numel) // shape[1]
        # An expert with long rows has large logits, and so more often one of the largest.
        return values * torch.linspace(0.05, 0.5, shape[0])[rows]

    engine.read_state(read)
    engine.adopt_state(0, None)


def _moments(engine: TrainEngine) -> dict[str, Tensor]:
    """First moments of the routers' maps, whole, fp64. Collective: All ranks."""
    found: dict[str, Any] = {
        tensor.name: torch.zeros(tensor.global_numel, dtype=torch.float64)
        for tensor in engine.logical_tensors
        if tensor.name.endswith(_MAPS)
    }
    for fragment in engine.fragments():
        if fragment.tensor.name in found:
            part = fragment.states["exp_avg"]
            found[fragment.tensor.name][fragment.start : fragment.start + fragment.numel] = part.double()
    return {name: all_reduce_sum(whole, world_group()) for name, whole in found.items()}


def _spoiled(size: StepSize, task: Task) -> StepSize:
    """Make sizes wrong for balance terms alone: cross-entropy is weighed by the parts over the targets."""
    parts, tokens = size.num_parts * task.parts_factor, size.num_tokens * task.tokens_factor
    return replace(size, num_parts=parts, num_tokens=tokens, num_targets=size.num_targets * task.parts_factor)
