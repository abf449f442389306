"""Small checkpoints made without training: several files, tensors whose ranges cross them, and a bias."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.files import write_tensor_file
from moe_train.checkpoint.folders import begin_checkpoint, complete_checkpoint
from moe_train.checkpoint.manifest import ADAM_MOMENTS, FORMAT_VERSION

SHAPES = {"embedding.weight": (5, 3), "experts.gate_up": (2, 3, 2), "norm.weight": (3,), "nothing": (0,)}
BUFFERS = {"router.bias": [0.5, -0.25]}
CONFIG = {
    "model": {"hidden_size": 3, "vocab_size": 5, "moe": {"num_experts": 2}},
    "train": {"run_dir": "runs/made", "seed": 0},
    "deepspeed": {},
}
LAYOUT = {"world_size": 2, "expert_parallel_size": 1, "zero_stage": 1}

KINDS = ("weight", *ADAM_MOMENTS)
State = dict[str, Tensor]  # flat, by "kind/name"


def made_state(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> State:
    """Whole tensors that are the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"{kind}/{name}" for kind in KINDS for name in shapes]
    return {name: torch.randn(math.prod(shapes[name.partition("/")[2]]), generator=generator) for name in names}


def made_ranges(world_size: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> list[dict[str, tuple[int, int]]]:
    """Start and length of every rank's range: equal parts of all elements in a row, so that tensors cross files."""
    total = sum(map(math.prod, shapes.values()))
    bounds = [total * rank // world_size for rank in range(world_size + 1)]
    ranges: list[dict[str, tuple[int, int]]] = []
    for begin, end in itertools.pairwise(bounds):
        owned, place = {}, 0
        for name, shape in shapes.items():
            low, high = max(begin, place), min(end, place + math.prod(shape))
            if low < high:
                owned[name] = (low - place, high - low)
            place += math.prod(shape)
        ranges.append(owned)
    return ranges


def make_values(files: Mapping[str, Any], step: int, **changes: Any) -> dict[str, Any]:
    """What a manifest holds beside its digest."""
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "consumed_sequences": 8 * step,
        "tokenizer": "bytes",
        "guard": {"grad_norms": [1.0, 0.5], "skipped_steps": 0},
        "layout": LAYOUT,
        "config": CONFIG,
        "optimizer_step": step,
        "loss_scale": 1.0,
        "buffers": BUFFERS,
        "tensors": {name: list(shape) for name, shape in SHAPES.items()},
        "files": dict(files),
    } | changes


def make_checkpoint(
    checkpoints: Path,
    step: int = 1,
    world_size: int = 2,
    state: State | None = None,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    **changes: Any,
) -> Path:
    """A completed checkpoint; `latest` names it.

    Args:
        checkpoints: The run's folder for them.
        step: Of the checkpoint.
        world_size: Files that share the elements.
        state: Whole tensors; None: those of `made_state`.
        shapes: Of the tensors.
        changes: Values of the manifest in place of the usual ones.
    """
    state = made_state(shapes=shapes) if state is None else state
    part = begin_checkpoint(checkpoints, step)
    files = {}
    for rank, ranges in enumerate(made_ranges(world_size, shapes)):
        if not ranges:
            continue
        tensors = {
            f"{kind}/{name}": state[f"{kind}/{name}"][start : start + numel]
            for kind in KINDS
            for name, (start, numel) in ranges.items()
        }
        files[f"rank_{rank:05d}.safetensors"] = file_entry(part / f"rank_{rank:05d}.safetensors", tensors, ranges)
    layout = LAYOUT | {"world_size": world_size}
    values = make_values(files, step, layout=layout, tensors={name: list(shape) for name, shape in shapes.items()})
    return complete_checkpoint(part, values | changes)


def file_entry(path: Path, tensors: Mapping[str, Tensor], ranges: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Write a tensor file; what the manifest says of it."""
    written = write_tensor_file(path, tensors)
    return {
        "xxh3_128": written.digest,
        "bytes": written.num_bytes,
        "ranges": {name: list(found) for name, found in ranges.items()},
    }
