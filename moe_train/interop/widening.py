"""Widening of MLPs without a change of their output: new inner columns contribute zero until training changes them.

Source: Zuhri et al. 2024, arXiv 2406.09297, who widen MLPs to keep the number of parameters after a reduction of keys
and values.
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

_MULTIPLE = 8  # inner widths grow by multiples of it


@dataclass(frozen=True)
class Widening:
    """Growth of the inner widths.

    Attributes:
        dense: Columns added to every dense SwiGLU.
        experts: Columns added to every expert.
    """

    dense: int
    experts: int


def plan_widening(model: ModelConfig, spare: int) -> Widening:
    """Choose the widening that uses most of the spare parameters.

    If several do, it takes the one whose relative growth of dense SwiGLUs and of experts is most equal.

    Args:
        model: Model section of the narrower model.
        spare: Number of parameters that may be added.

    Raises:
        UsageError: If they are too few for the smallest step.
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
    """Compute the inner widths of the wider model.

    Args:
        model: Model section of the narrower model.
        widening: Growth of the inner widths.

    Returns:
        Values of the fields intermediate_size and moe.intermediate_size. None for the second means that experts have
        the width of the first.
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
    """Widen a tensor, flattened, in blocks.

    New columns of gate and up are drawn; the draws depend on the seed and the name of the tensor. New columns of down
    are zero.

    Args:
        reader: Reader of the narrower checkpoint.
        name: Name of the tensor.
        before: Shape of the tensor in the checkpoint.
        after: Shape of the wider tensor.
        seed: Seed of the run.
        std: Standard deviation of the new values of gate and up.

    Yields:
        Consecutive blocks of the wider tensor, 1-D.
    """
    outer, narrow, wide, inner = _as_outer_width_inner(name, before, after)
    extra = wide - narrow
    key = make_key(seed, "widen", name) if "gate_up" in name else None

    def new_values(first: int, count: int) -> Tensor:
        values = torch.zeros(count, extra, inner)
        if key is not None:
            fill_normal_(values, key, first * extra * inner, std)
        return values

    if inner > 1:  # few parts, but a part may be large
        for part in range(outer):
            begin, end = part * narrow * inner, (part + 1) * narrow * inner
            for start in range(begin, end, CHUNK):
                yield reader.read(name, "weight", start, min(start + CHUNK, end))
            yield new_values(part, 1).view(-1)
        return
    rows = max(1, CHUNK // wide)  # many parts, and each is one row
    for first in range(0, outer, rows):
        count = min(rows, outer - first)
        old = reader.read(name, "weight", first * narrow, (first + count) * narrow).view(count, narrow, 1)
        yield torch.cat((old, new_values(first, count)), dim=1).view(-1)


def _as_outer_width_inner(name: str, before: Sequence[int], after: Sequence[int]) -> tuple[int, int, int, int]:
    """View an MLP tensor as [outer, width, inner], and return outer, width before, width after, inner."""
    is_expert, is_gate_up = len(before) == 3, "gate_up" in name
    if is_expert and is_gate_up:  # [E, D, 2F] = [E*D*2, F, 1]
        return math.prod(before[:2]) * 2, before[2] // 2, after[2] // 2, 1
    if is_expert:  # [E, F, D]
        return before[0], before[1], after[1], before[2]
    if is_gate_up:  # [2F, D] = [2, F, D]
        return 2, before[0] // 2, after[0] // 2, before[1]
    return before[0], before[1], after[1], 1  # [D, F] = [D, F, 1]
