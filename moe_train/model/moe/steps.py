"""What passes between the four steps of an MoE layer: route -> dispatch -> experts -> combine.

Legend: T tokens of this rank, K top_k, E experts, D hidden_size, R rows received, e experts of this rank, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingSums:
    """Sums over tokens, to be added over micro-batches, ranks and steps before any ratio is formed.

    Attributes:
        importance: [..., E] fp32 or wider, sum of gates an expert; differentiable.
        load: [..., E] fp32 or wider, expected number of tokens an expert; differentiable where the router draws noise,
            else the counts.
        counts: [..., E] int64, assignments an expert.
    """

    importance: Tensor
    load: Tensor
    counts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every sum, in an order from which `RoutingSums(*tensors)` makes them again."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        """The sums of several layers, [L, E]."""
        return cls(*(torch.stack(same) for same in zip(*(layer.tensors for layer in layers), strict=True)))


@dataclass(frozen=True)
class Routing:
    """A router's decision.

    Attributes:
        gates_TK: fp32 or wider, factors of the chosen experts' outputs.
        experts_TK: int64, the chosen experts.
        logits_TE: fp32 or wider, clean logits (for balance terms).
        sums: Sums over the tokens, [E] each.
    """

    gates_TK: Tensor
    experts_TK: Tensor
    logits_TE: Tensor
    sums: RoutingSums


@dataclass(frozen=True)
class Dispatched:
    """Rows at their experts, and what `combine` needs to bring them back.

    Attributes:
        rows_RD: Rows of this rank's experts, grouped by expert.
        counts_e: int64, rows an expert of this rank.
        gates_TK: The routing's gates.
        order_A: int64, the sender's order of its T*K assignments by expert.
        inverse_A: int64, its inverse.
        regroup_R: int64, order of the received rows by local expert, or None where they arrive so.
        regroup_inverse_R: int64, its inverse, or None.
        send: Rows sent to each rank of the group.
        receive: Rows received from each rank of the group.
    """

    rows_RD: Tensor
    counts_e: Tensor
    gates_TK: Tensor
    order_A: Tensor
    inverse_A: Tensor
    regroup_R: Tensor | None
    regroup_inverse_R: Tensor | None
    send: tuple[int, ...]
    receive: tuple[int, ...]
