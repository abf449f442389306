"""What passes between the four steps of an MoE layer: route -> dispatch -> experts -> combine.

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
    """Sums over tokens, to be added over micro-batches, ranks and steps before any ratio is formed.

    Floating sums are fp32 or wider. [...] is nothing for one layer and [L] for a model.

    Attributes:
        importance: [..., E], sum of gates an expert; differentiable.
        load: [..., E], expected number of tokens an expert; differentiable where the router draws noise, else the
            counts.
        probability: [..., E], sum over tokens of the router's distribution over experts; differentiable.
        counts: [..., E] int64, assignments an expert, dropped ones included.
        dropped: [..., E] int64, assignments an expert had no room for.
        sequence_balance: [...], sum over sequences of E sum_i f_i p_i (f_i: the share of the sequence's assignments
            that expert i has; p_i: its mean probability over the sequence); differentiable.
        squared_logsumexp: [...], sum over tokens of logsumexp(logits)^2; differentiable.
        entropy: [...], sum over tokens of the entropy of the router's distribution, nats.
        tokens: [...] int64.
        sequences: [...] int64.
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
    tokens: Tensor
    sequences: Tensor
    rows: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every sum, in an order from which `RoutingSums(*tensors)` makes them again."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        """The sums of several layers, [L, ...]."""
        return cls(*(torch.stack(same) for same in zip(*(layer.tensors for layer in layers), strict=True)))

    def plus(self, other: Self) -> Self:
        """The sums of both, without gradients."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return type(self)(*(ours.detach() + theirs.detach() for ours, theirs in pairs))


@dataclass(frozen=True)
class Routing:
    """A router's decision.

    Attributes:
        gates_TK: fp32 or wider, factors of the chosen experts' outputs.
        experts_TK: int64, the chosen experts.
        logits_TE: fp32 or wider, clean logits.
        sums: Sums over the tokens.
        kept_TK: bool, assignments that their experts have room for; None: all.
    """

    gates_TK: Tensor
    experts_TK: Tensor
    logits_TE: Tensor
    sums: RoutingSums
    kept_TK: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits_TE.shape[1]


@dataclass(frozen=True)
class Assignments:
    """Which experts take which of the rows that are here: all experts before dispatch, this rank's behind it.

    Attributes:
        row_map: The row of every assignment, in the order of experts. Behind those that counts_e counts may stand
            others, which are not executed.
        gates_R: fp32 or wider, the factor of every assignment's output.
        counts_e: int64, executed assignments per expert.
    """

    row_map: RowMap
    gates_R: Tensor
    counts_e: Tensor

    @property
    def num_assignments(self) -> int:
        """R, those that are not executed included."""
        return self.row_map.source_R.shape[0]

    def first(self, count: int) -> "Assignments":
        """The first assignments alone: those that are executed, where their number is given."""
        if count == self.num_assignments:
            return self
        row_map = RowMap.of(self.row_map.source_R[:count], self.row_map.num_sources)
        return Assignments(row_map, self.gates_R[:count], self.counts_e)
