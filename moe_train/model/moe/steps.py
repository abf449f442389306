"""Data that pass between the four steps of an MoE layer: route -> dispatch -> experts -> combine.

Legend: T tokens of this rank, K top_k, A = T*K assignments, E experts, R assignments of this rank's experts, e experts
of this rank, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from moe_train.ops.row_map import RowMap


@dataclass(frozen=True)
class RoutingSums:
    """Sums over tokens, to be added over micro-batches, ranks and steps before any ratio is computed.

    Floating sums are fp32 or wider. [...] is empty for one layer, and [L] for a model.

    Attributes:
        importance: [..., E], sum of gates per expert; differentiable.
        load: [..., E], expected number of tokens per expert; differentiable if the router draws noise, else the counts.
        probability: [..., E], sum over tokens of the router's distribution over experts; differentiable.
        counts: [..., E] int64, assignments per expert, dropped ones included.
        dropped: [..., E] int64, assignments that an expert had no room for.
        sequence_balance: [...], sum over sequences of E sum_i f_i p_i (f_i: the share of the sequence's assignments
            that expert i has; p_i: its mean probability over the sequence); differentiable.
        squared_logsumexp: [...], sum over tokens of logsumexp(logits)^2; differentiable.
        entropy: [...], sum over tokens of the entropy of the router's distribution, nats.
        agreement: [...] int64, assignments that the router would have made without its noise too.
        tokens: [...] int64, number of tokens.
        sequences: [...] int64, number of sequences.
        rows: [...] int64, rows that this rank's experts computed: over all ranks, the assignments not dropped.
    """

    importance: Tensor
    load: Tensor
    probability: Tensor
    counts: Tensor
    dropped: Tensor
    sequence_balance: Tensor
    squared_logsumexp: Tensor
    entropy: Tensor
    agreement: Tensor
    tokens: Tensor
    sequences: Tensor
    rows: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All sums, in the order of the arguments of `RoutingSums`."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        """Stack the sums of several layers, [L, ...]."""
        return cls(*(torch.stack(same) for same in zip(*(layer.tensors for layer in layers), strict=True)))

    def plus(self, other: Self) -> Self:
        """Add the sums of both, without gradients."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return type(self)(*(ours.detach() + theirs.detach() for ours, theirs in pairs))


@dataclass(frozen=True)
class Routing:
    """Decision of a router.

    Attributes:
        gates_TK: fp32 or wider, factors of the chosen experts' outputs.
        experts_TK: int64, chosen experts.
        logits_TE: fp32 or wider, clean logits.
        sums: Routing sums over the tokens.
        kept_TK: bool, assignments that their experts have room for; None: all.
    """

    gates_TK: Tensor
    experts_TK: Tensor
    logits_TE: Tensor
    sums: RoutingSums
    kept_TK: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E, number of experts."""
        return self.logits_TE.shape[1]


@dataclass(frozen=True)
class Assignments:
    """Assignments of the rows on this rank: to all experts before dispatch, to this rank's experts after it.

    Attributes:
        row_map: Row of every assignment, in the order of experts. After those that counts_e counts, there may be
            others, which are not executed.
        gates_R: fp32 or wider, factor of every assignment's output.
        counts_e: int64, executed assignments per expert.
    """

    row_map: RowMap
    gates_R: Tensor
    counts_e: Tensor

    @property
    def num_assignments(self) -> int:
        """R, number of assignments, including those that are not executed."""
        return self.row_map.source_R.shape[0]

    def first(self, count: int) -> "Assignments":
        """Return only the first assignments: those that are executed, if `count` is their number."""
        if count == self.num_assignments:
            return self
        row_map = RowMap.of(self.row_map.source_R[:count], self.row_map.num_sources)
        return Assignments(row_map, self.gates_R[:count], self.counts_e)
