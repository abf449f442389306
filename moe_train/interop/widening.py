"""Wider MLPs that compute what the narrower ones did: new inner columns whose output is zero until training changes it.

Source: MLPs are widened to keep the number of parameters where keys and values were reduced: Zuhri et al. 2024, arXiv
2406.09297.
Legend: D hidden_size, F intermediate_size, E experts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.tools.inspection import CHUNK
from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.ops.keyed_random import fill_normal_, make_key

_MULTIPLE = 8  # of what an inner width grows by


@dataclass(frozen=True)
class Widening:
    """What the inner widths grow by.

    Attributes:
        dense: Of the dense SwiGLUs.
        experts: Of every expert.
    """

    dense: int
    experts: int


def plan_widening(model: ModelConfig, spare: int) -> Widening:
    """The widths that take up most of what is spare; of several such pairs the one that widens both most alike.

    Args:
        model: The narrower model.
        spare: Parameters that it may grow by.

    Raises:
        UsageError: If there is too little for the smallest step.
    """
    num_moe, moe = len(model.moe_layer_indices), model.moe
    dense_step = 3 * model.hidden_size * (model.num_layers - num_moe) * _MULTIPLE
    expert_step = 3 * model.hidden_size * (moe.num_experts + moe.num_shared_experts) * num_moe * _MULTIPLE
    smallest = min(step for step in (dense_step, expert_step) if step)
    if spare < smallest:
        raise UsageError(
            f"--widen-mlp has no effect: MLPs wider by {_MULTIPLE} have {smallest} more parameters, the reduction "
            f"saves {spare}"
        )

    def unused_and_uneven(counts: tuple[int, int]) -> tuple[int, float]:
        dense, experts = counts
        uneven = abs(dense / model.intermediate_size - experts / model.expert_intermediate_size)
        return spare - dense * dense_step - experts * expert_step, uneven if dense_step and expert_step else 0.0

    pairs = []
    for dense in range(spare // dense_step + 1 if dense_step else 1):
        rest = spare - dense * dense_step
        pairs.append((dense, rest // expert_step if expert_step else 0))
    dense, experts = min(pairs, key=unused_and_uneven)
    return Widening(_MULTIPLE * dense, _MULTIPLE * experts)


def widened_widths(model: ModelConfig, widening: Widening) -> dict[str, int | None]:
    """The inner widths of the wider model: intermediate_size and moe.intermediate_size (None: the same).

    Args:
        model: The narrower model.
        widening: What it grows by.
    """
    dense, experts = model.intermediate_size + widening.dense, model.expert_intermediate_size + widening.experts
    num_moe, expert_width = len(model.moe_layer_indices), model.moe.intermediate_size
    if num_moe == 0:
        return {"intermediate_size": dense, "moe.intermediate_size": expert_width}
    if num_moe == model.num_layers:  # only one of the two fields has an effect
        if expert_width is None:
            return {"intermediate_size": experts, "moe.intermediate_size": None}
        return {"intermediate_size": model.intermediate_size, "moe.intermediate_size": experts}
    is_same = expert_width is None and dense == experts
    return {"intermediate_size": dense, "moe.intermediate_size": None if is_same else experts}


def widened_blocks(
    reader: RangeReader, name: str, before: Sequence[int], after: Sequence[int], seed: int, std: float
) -> Iterator[Tensor]:
    """A wider tensor, flattened, in blocks: what was there, with new columns of gate and up drawn by name and new ones
    of down zero.

    Args:
        reader: Of the narrower checkpoint.
        name: Of the tensor.
        before: Its shape there.
        after: Its new shape.
        seed: Of the run.
        std: Standard deviation of new values of gate and up.
    """
    outer, narrow, wide, inner = _as_outer_width_inner(name, before, after)
    extra = wide - narrow
    key = make_key(seed, "widen", name) if "gate_up" in name else None

    def new_values(first: int, count: int) -> Tensor:
        values = torch.zeros(count, extra, inner)
        if key is not None:
            fill_normal_(values, key, first * extra * inner, std)
        return values

    if inner > 1:  # few parts, each of which may be large
        for part in range(outer):
            begin, end = part * narrow * inner, (part + 1) * narrow * inner
            for start in range(begin, end, CHUNK):
                yield reader.read(name, "weight", start, min(start + CHUNK, end))
            yield new_values(part, 1).view(-1)
        return
    rows = max(1, CHUNK // wide)  # many parts, each of which is a row
    for first in range(0, outer, rows):
        count = min(rows, outer - first)
        old = reader.read(name, "weight", first * narrow, (first + count) * narrow).view(count, narrow, 1)
        yield torch.cat((old, new_values(first, count)), dim=1).view(-1)


def _as_outer_width_inner(name: str, before: Sequence[int], after: Sequence[int]) -> tuple[int, int, int, int]:
    """A tensor of an MLP seen as [outer, width, inner]: outer, width before and after, inner."""
    is_expert, is_gate_up = len(before) == 3, "gate_up" in name
    if is_expert and is_gate_up:  # [E, D, 2F] = [E*D*2, F, 1]
        return math.prod(before[:2]) * 2, before[2] // 2, after[2] // 2, 1
    if is_expert:  # [E, F, D]
        return before[0], before[1], after[1], before[2]
    if is_gate_up:  # [2F, D] = [2, F, D]
        return 2, before[0] // 2, after[0] // 2, before[1]
    return before[0], before[1], after[1], 1  # [D, F] = [D, F, 1]
