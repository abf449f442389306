"""Attention of a sequence that several ranks share: one function with its gradients, over all ranks' keys.

Each rank computes the outputs of its own tokens. Keys and values travel, queries do not. The backward pass sends them
again, so that only tensors of a rank's own tokens are kept.
Legend: B batch, H query heads, G key/value heads, s tokens of a rank, d head size, P ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.distributed.context import (
    ContextRanks,
    ContextShard,
    gather_gradients,
    visit_key_values,
    visiting_order,
)
from moe_train.ops.ring_attention import BlockGradients, MergedAttention, RowVisibility


def context_attention(
    q_BHsd: Tensor, k_BGsd: Tensor, v_BGsd: Tensor, shard: ContextShard, window: int | None = None
) -> Tensor:
    """Compute causal attention of this rank's tokens over the tokens of all ranks that share the rows.

    Args:
        q_BHsd: Queries of this rank's tokens, rotated by their positions in the row.
        k_BGsd: Keys of this rank's tokens, rotated likewise; G must divide H.
        v_BGsd: Values of this rank's tokens.
        shard: This rank's part of the rows.
        window: Most positions that a query sees, its own included; None: all.

    Returns:
        [B, H, s, d], the outputs.

    Collective: All ranks that share the rows, in the backward pass too.
    """
    return attention_with_logsumexp(q_BHsd, k_BGsd, v_BGsd, shard, window)[0]


def attention_with_logsumexp(
    q_BHsd: Tensor, k_BGsd: Tensor, v_BGsd: Tensor, shard: ContextShard, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `context_attention`, and the logsumexp of the scores [B, H, s], fp32 or wider, without a gradient."""
    visibility = RowVisibility(shard.length, window, shard.documents_BS, shard.reach)
    return _ContextAttention.apply(q_BHsd, k_BGsd, v_BGsd, visibility, shard.ranks)


def gathered_attention(
    q_BHsd: Tensor, k_PBGsd: Tensor, v_PBGsd: Tensor, shard: ContextShard, window: int | None = None
) -> Tensor:
    """Compute `context_attention` over keys and values that are here, from `gather_key_values`. Nothing is sent."""
    visibility = RowVisibility(shard.length, window, shard.documents_BS, shard.reach)
    mixed: Tensor = _GatheredAttention.apply(q_BHsd, k_PBGsd, v_PBGsd, visibility, shard.ranks)
    return mixed


class _GatheredAttention(torch.autograd.Function):
    """Merged attention with its gradients, over the blocks of gathered keys."""

    @staticmethod
    def forward(
        ctx: Any, q_BHsd: Tensor, k_PBGsd: Tensor, v_PBGsd: Tensor, visibility: RowVisibility, ranks: ContextRanks
    ) -> Tensor:
        merged = MergedAttention(q_BHsd, visibility)
        for source in visiting_order(ranks.rank, ranks.size):
            for block in visibility.blocks(ranks.size, ranks.rank, source):
                merged.add(block, k_PBGsd[source], v_PBGsd[source])
        out_BHsd = merged.out_BHsd.to(q_BHsd.dtype)
        ctx.save_for_backward(q_BHsd, k_PBGsd, v_PBGsd, out_BHsd, merged.lse_BHs)
        ctx.visibility, ctx.ranks = visibility, ranks
        return out_BHsd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHsd: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_BHsd, k_PBGsd, v_PBGsd, out_BHsd, lse_BHs = ctx.saved_tensors
        visibility: RowVisibility = ctx.visibility
        ranks: ContextRanks = ctx.ranks
        gradients = BlockGradients(gradient_BHsd, q_BHsd, out_BHsd, lse_BHs, visibility)
        wide = gradients.dq_BHsd.dtype
        dk_PBGsd, dv_PBGsd = (torch.zeros_like(held, dtype=wide) for held in (k_PBGsd, v_PBGsd))
        for source in visiting_order(ranks.rank, ranks.size):
            for block in visibility.blocks(ranks.size, ranks.rank, source):
                gradients.add(block, k_PBGsd[source], v_PBGsd[source], dk_PBGsd[source], dv_PBGsd[source])
        return gradients.dq_BHsd.to(q_BHsd.dtype), dk_PBGsd.to(k_PBGsd.dtype), dv_PBGsd.to(v_PBGsd.dtype), None, None


class _ContextAttention(torch.autograd.Function):
    """Merged attention with its gradients, because the parts' logsumexp has none (see ops/partial_attention.py)."""

    @staticmethod
    def forward(
        ctx: Any, q_BHsd: Tensor, k_BGsd: Tensor, v_BGsd: Tensor, visibility: RowVisibility, ranks: ContextRanks
    ) -> tuple[Tensor, Tensor]:
        merged = MergedAttention(q_BHsd, visibility)
        for source, (k, v) in visit_key_values(torch.stack((k_BGsd, v_BGsd)), ranks):
            for block in visibility.blocks(ranks.size, ranks.rank, source):
                merged.add(block, k, v)
        out_BHsd, lse_BHs = merged.out_BHsd.to(q_BHsd.dtype), merged.lse_BHs
        ctx.save_for_backward(q_BHsd, k_BGsd, v_BGsd, out_BHsd, lse_BHs)
        ctx.visibility, ctx.ranks = visibility, ranks
        ctx.mark_non_differentiable(lse_BHs)
        return out_BHsd, lse_BHs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHsd: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_BHsd, k_BGsd, v_BGsd, out_BHsd, lse_BHs = ctx.saved_tensors
        visibility: RowVisibility = ctx.visibility
        ranks: ContextRanks = ctx.ranks
        gradients = BlockGradients(gradient_BHsd, q_BHsd, out_BHsd, lse_BHs, visibility)

        def add(source: int, held: Tensor, share: Tensor) -> None:
            for block in visibility.blocks(ranks.size, ranks.rank, source):
                gradients.add(block, *held, *share)

        dk_BGsd, dv_BGsd = gather_gradients(torch.stack((k_BGsd, v_BGsd)), add, ranks)
        return gradients.dq_BHsd.to(q_BHsd.dtype), dk_BGsd.to(k_BGsd.dtype), dv_BGsd.to(v_BGsd.dtype), None, None
