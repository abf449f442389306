"""Muon for the matrices of the blocks, AdamW for everything else: embedding, head, norms, routers, vectors.

A matrix's momentum is orthogonalised as a whole, whatever ranges of it ZeRO gives to the ranks: once per optimizer
step, after clipping, every matrix is gathered, one rank of the group computes its update, and each rank takes its range
of it. So the numbers are those of one process.

Source: Jordan 2024; Liu et al. 2025, arXiv 2502.16982, equation 4 (the factor 0.2 sqrt(max(A, B))).
Legend: n matrices, N all matrices of a parameter, A rows, B columns.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.optim.adamw import adamw

from moe_train.config.base import Section
from moe_train.config.run import OptimConfig
from moe_train.distributed.collectives import Group, all_reduce_sum, group_rank, group_size
from moe_train.ops.newton_schulz import orthogonalize, products
from moe_train.train.engine.optimizers.base import FlatPart, OptimizerKind

_BUCKET_ELEMENTS = 1 << 25  # gathered at a time: 128 MiB
_RMS = 0.2  # of an update's elements, near that of AdamW's: so both can have one learning rate


class MuonConfig(Section):
    """Settings of Muon."""

    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay rate of the momentum of matrices."""
    lr_factor: PositiveFloat = 1.0
    """Factor of the learning rate of matrices."""
    epsilon: PositiveFloat = 1e-7
    """Constant that is added to a matrix's norm."""
    newton_schulz_dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the orthogonalisation. bf16: faster on a GPU, but the numbers depend on the layout of ranks."""


@dataclass(frozen=True)
class _Matrices:
    """Matrices of a flat parameter that lie one after the other in a bucket.

    Attributes:
        part: Their part of the flat partition.
        start: Place in the bucket.
        first: Place of its first stacked entry (an expert, or the parameter) among those of the bucket.
    """

    part: FlatPart
    start: int
    first: int


class Muon(torch.optim.Optimizer):
    """Optimizer whose groups say with "is_matrix" which of the two rules they follow."""

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig, section: MuonConfig) -> None:
        super().__init__(groups, {"lr": optim.learning_rate})
        self._optim, self._section = optim, section
        self._layout: dict[int, tuple[Sequence[FlatPart], Group | None]] = {}
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[section.newton_schulz_dtype]

    def bind(self, flat: Tensor, parts: Sequence[FlatPart], group: Group | None) -> None:
        """Say where the parameters lie in a flat partition of matrices.

        Args:
            flat: Partition that `step` will update.
            parts: Every parameter of which some rank of the group has a range in its own partition, in the same order
                on all of them.
            group: Ranks that share the parameters; None: this process is alone.
        """
        self._layout[id(flat)] = (tuple(parts), group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the partitions that have gradients. Collective: all ranks of each partition's group."""
        del closure
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                gradient, state = flat.grad, self.state[flat]
                if not state:
                    state |= MUON.new_state(flat, group["is_matrix"])
                if group["is_matrix"]:
                    state["step"] += 1
                    self._step_of_matrices(flat, gradient, state, group["lr"], group["weight_decay"])
                else:  # which counts the steps itself
                    self._step_of_others(flat, gradient, state, group["lr"], group["weight_decay"])

    def _step_of_others(
        self, flat: Tensor, gradient: Tensor, state: dict[str, Tensor], rate: float, weight_decay: float
    ) -> None:
        adamw(
            [flat],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=self._optim.beta1,
            beta2=self._optim.beta2,
            lr=rate,
            weight_decay=weight_decay,
            eps=self._optim.epsilon,
            maximize=False,
        )

    def _step_of_matrices(
        self, flat: Tensor, gradient: Tensor, state: dict[str, Tensor], rate: float, weight_decay: float
    ) -> None:
        rate, momentum = rate * self._section.lr_factor, state["exp_avg"]
        momentum.mul_(self._section.momentum).add_(gradient)
        wanted = torch.add(gradient, momentum, alpha=self._section.momentum)  # Nesterov
        parts, group = self._layout[id(flat)]
        for bucket in _buckets(parts):
            whole, moved = _gather(bucket, wanted, gradient, group)
            updates = self._updates(bucket, whole, moved, group)
            for matrices in bucket:
                _apply(matrices, flat, updates, moved, rate, weight_decay)

    def _updates(self, bucket: list[_Matrices], whole: Tensor, moved: Tensor, group: Group | None) -> Tensor:
        """Compute the updates of a bucket, each matrix's on one rank of the group, and give them to all."""
        rank, updates = group_rank(group), torch.zeros_like(whole)
        owners = _owners([matrices.part for matrices in bucket], group_size(group))
        for matrices, owner_N in zip(bucket, owners, strict=True):
            part, end = matrices.part, matrices.start + matrices.part.whole_numel
            ours = [number for number, owner in enumerate(owner_N) if owner == rank]
            if not ours:
                continue
            stacked = torch.tensor([number // part.beside for number in ours], device=whole.device)
            beside = torch.tensor([number % part.beside for number in ours], device=whole.device)
            found_nAB = part.split(whole[matrices.start : end])[stacked, beside]
            update_nAB = orthogonalize(found_nAB, self._section.epsilon, self._dtype)
            update_nAB *= moved[matrices.first + stacked].view(-1, 1, 1) * _RMS * math.sqrt(max(update_nAB.shape[1:]))
            part.split(updates[matrices.start : end])[stacked, beside] = update_nAB
        return all_reduce_sum(updates, group)


def _buckets(parts: Sequence[FlatPart]) -> Iterator[list[_Matrices]]:
    """Cut the parameters of a partition into buckets of bounded size, the same on all ranks of the group."""
    bucket: list[_Matrices] = []
    start = first = 0
    for part in parts:
        if bucket and start + part.whole_numel > _BUCKET_ELEMENTS:
            yield bucket
            bucket, start, first = [], 0, 0
        bucket.append(_Matrices(part, start, first))
        start, first = start + part.whole_numel, first + part.stacked
    if bucket:
        yield bucket


def _gather(bucket: list[_Matrices], wanted: Tensor, gradient: Tensor, group: Group | None) -> tuple[Tensor, Tensor]:
    """Gather the matrices of a bucket, and find those that have a gradient: an expert without tokens has none.

    Returns:
        The matrices, flat; 1 or 0 for each stacked entry of each parameter.
    """
    total = bucket[-1].start + bucket[-1].part.whole_numel
    both = wanted.new_zeros(total + bucket[-1].first + bucket[-1].part.stacked)
    for matrices in bucket:
        part, per_entry = matrices.part, matrices.part.whole_numel // matrices.part.stacked
        place = matrices.start + part.start
        both[place : place + part.numel] = wanted[part.offset : part.offset + part.numel]
        end = part.start + part.numel
        for entry in range(part.start // per_entry, -(-end // per_entry) if part.numel else 0):
            low, high = max(part.start, entry * per_entry), min(end, (entry + 1) * per_entry)
            own = gradient[part.offset + low - part.start : part.offset + high - part.start]
            both[total + matrices.first + entry] = own.any()
    both = all_reduce_sum(both, group)
    return both[:total], (both[total:] > 0).to(both.dtype)


def _apply(matrices: _Matrices, flat: Tensor, updates: Tensor, moved: Tensor, rate: float, weight_decay: float) -> None:
    """Update this rank's range of a parameter; entries that are not moved do not decay either."""
    part = matrices.part
    if not part.numel:
        return
    per_entry, place = part.whole_numel // part.stacked, matrices.start + part.start
    weights = flat[part.offset : part.offset + part.numel]
    decayed = moved[matrices.first : matrices.first + part.stacked]
    if part.stacked > 1:
        first = part.start // per_entry
        last = (part.start + part.numel - 1) // per_entry
        spread = decayed[first : last + 1].repeat_interleave(per_entry)
        decayed = spread[part.start - first * per_entry :][: part.numel]
    weights.mul_(1.0 - rate * weight_decay * decayed).add_(updates[place : place + part.numel], alpha=-rate)


def _owners(parts: Sequence[FlatPart], num_ranks: int) -> list[list[int]]:
    """Spread matrices over ranks so that the work is even: the rank of each matrix of each part."""
    owners = [[0] * (part.stacked * part.beside) for part in parts]
    if num_ranks == 1:
        return owners
    costs = []
    for place, part in enumerate(parts):
        rows, columns = part.matrix_shape
        costs += [(-rows * columns * min(rows, columns), place, number) for number in range(len(owners[place]))]
    busy = [(0, rank) for rank in range(num_ranks)]
    for cost, place, number in sorted(costs):
        load, rank = heapq.heappop(busy)
        owners[place][number] = rank
        heapq.heappush(busy, (load - cost, rank))
    return owners


def _build(groups: list[dict[str, Any]], optim: OptimConfig, section: MuonConfig) -> Muon:
    return Muon(groups, optim, section)


MUON = OptimizerKind(
    _build,
    moments=("exp_avg", "exp_avg_sq"),
    fields=frozenset({"beta1", "beta2", "epsilon"}),
    section=MuonConfig,
    matrix_moments=("exp_avg",),
    matrix_products=products,
    bucket_elements=_BUCKET_ELEMENTS,
)
