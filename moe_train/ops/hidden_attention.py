"""Attention of parallel hidden decoding: every token with hidden copies, without a mask of all copies times all copies.

Every copy sees the originals (copy 1) up to its position; only hidden copies (2, ..., n) see hidden copies: of their
own position those up to themselves, and all of the few positions before. So a query's keys are in two parts. For the
originals' keys, the copies of a token are further query heads of one causal attention. For hidden keys, positions are
cut into blocks, and a query sees keys of its block and the one before. Both are merged exactly.

Source: Wu et al. 2025, arXiv 2504.14992.
Legend: B batch, R rows of offsets (B or 1), H query heads, G key/value heads, n copies, S positions, N = n*S stream,
c = n - 1 hidden copies of a position, b blocks of s positions, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.ops.attention_blocks import AttentionBlocks, partial_blocks, partial_blocks_backward
from moe_train.ops.partial_attention import additive, merge_attention, partial_attention, partial_attention_backward

_LEAST_BLOCK = 16  # positions of a block: smaller ones compute fewer masked scores, but take longer


@dataclass(frozen=True)
class HiddenBlocks:
    """Which hidden keys each hidden query sees, in blocks of positions; within a block copies of a position adjoin.

    Attributes:
        copies: n, copies of a token, the original included; at least 2.
        size: s, positions of a block.
        looks_back: Whether the keys of the block before are among a block's keys, before its own.
        visible: bool [R, b, s*c, (1 or 2)*s*c], True where the query sees the key.
    """

    copies: int
    size: int
    looks_back: bool
    visible: Tensor


def block_keys(reach: int) -> int:
    """Count the positions of the hidden keys that are computed for a hidden query, visible or not.

    Args:
        reach: Most positions before its own that a query sees.
    """
    return (2 if reach else 1) * max(reach, _LEAST_BLOCK)


def hidden_reach(offsets_BS: Tensor, window: int, chunk: int | None) -> Tensor:
    """Count the positions before its own whose hidden copies a hidden query sees. int64 [B, S].

    Args:
        offsets_BS: int64 positions counted from the first token of the document.
        window: W, most positions.
        chunk: C, positions of a chunk, in which a query sees no position before the chunk; None: there are no chunks.
    """
    return (offsets_BS if chunk is None else offsets_BS % chunk).clamp(max=window)


def hidden_blocks(offsets_RS: Tensor, copies: int, window: int, chunk: int | None) -> HiddenBlocks:
    """Cut the positions of whole rows into blocks.

    Args:
        offsets_RS: int64 positions counted from the first token of the document; its tokens adjoin in the row.
        copies: n, copies of a token, the original included.
        window: W, positions before its own whose hidden copies a hidden query sees.
        chunk: C, positions of a chunk, counted from the first token of the document; None: there are no chunks.
    """
    window = window if chunk is None else min(window, chunk - 1)
    size, hidden, device = max(window, _LEAST_BLOCK), copies - 1, offsets_RS.device
    columns_S = torch.arange(offsets_RS.shape[1], device=device)
    reach_RS = torch.minimum(hidden_reach(offsets_RS, window, chunk), columns_S)
    reach_Rbs11 = F.pad(reach_RS, (0, -reach_RS.shape[1] % size)).unflatten(1, (-1, size))[..., None, None, None]
    queries_s = torch.arange(size, device=device)
    keys_m = torch.arange(-size if window else 0, size, device=device)
    distance_s1m1 = (queries_s[:, None] - keys_m)[:, None, :, None]
    copies_c = torch.arange(hidden, device=device)
    is_earlier_copy_1c1c = (copies_c <= copies_c[:, None])[None, :, None]
    before = (distance_s1m1 > 0) & (distance_s1m1 <= reach_Rbs11)
    visible = before | ((distance_s1m1 == 0) & is_earlier_copy_1c1c)
    return HiddenBlocks(copies, size, window > 0, visible.flatten(2, 3).flatten(3, 4))


def hidden_attention(
    q_BHNd: Tensor, k_BGNd: Tensor, v_BGNd: Tensor, blocks: HiddenBlocks, originals: AttentionBlocks | None
) -> Tensor:
    """Compute the attention of all copies of whole rows.

    Args:
        q_BHNd: Queries: those of the originals, then of copy 2, ..., of copy n, each in the order of the positions.
        k_BGNd: Keys, in the same order; G must divide H.
        v_BGNd: Values, in the same order.
        blocks: Visibility of hidden keys, from `hidden_blocks`.
        originals: Which originals each position sees; None: those of all positions up to its own.

    Returns:
        [B, H, N, d], the outputs of all copies.
    """
    return _HiddenAttention.apply(q_BHNd, k_BGNd, v_BGNd, blocks, originals)


class _HiddenAttention(torch.autograd.Function):
    """Merged attention with its gradients, because the parts' logsumexp has none (see partial_attention.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHNd: Tensor,
        k_BGNd: Tensor,
        v_BGNd: Tensor,
        blocks: HiddenBlocks,
        originals: AttentionBlocks | None,
    ) -> Tensor:
        (batch, heads, length, size), copies = q_BHNd.shape, blocks.copies
        positions = length // copies
        k_BGSd, v_BGSd = k_BGNd[:, :, :positions], v_BGNd[:, :, :positions]
        # (B, H, n*S, d) -> (B, H*n, S, d): a group's queries stay together.
        q = q_BHNd.reshape(batch, heads * copies, positions, size)
        if originals is None:
            out, lse = partial_attention(q, k_BGSd, v_BGSd, None, is_causal=True)
        else:
            out, lse = partial_blocks(q, k_BGSd, v_BGSd, originals)
        out_BHNd, lse_BHN = out.reshape(q_BHNd.shape), lse.reshape(q_BHNd.shape[:3])
        q, k, v, mask = _in_blocks(q_BHNd, k_BGNd, v_BGNd, blocks)
        near, near_lse = partial_attention(q, k, v, mask, is_causal=False)
        hidden = slice(positions, None)
        merged, merged_lse = merge_attention(
            out_BHNd[:, :, hidden],
            lse_BHN[:, :, hidden],
            _from_blocks(near, batch, positions, blocks),
            _from_blocks(near_lse.unsqueeze(-1), batch, positions, blocks).squeeze(-1),
        )
        out_BHNd[:, :, hidden], lse_BHN[:, :, hidden] = merged, merged_lse  # both are new tensors
        ctx.save_for_backward(q_BHNd, k_BGNd, v_BGNd, out_BHNd, lse_BHN, blocks.visible)
        ctx.blocks, ctx.originals = blocks, originals
        return out_BHNd

    @staticmethod
    def backward(ctx: Any, gradient_BHNd: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_BHNd, k_BGNd, v_BGNd, out_BHNd, lse_BHN, _ = ctx.saved_tensors
        blocks: HiddenBlocks = ctx.blocks
        (batch, heads, length, _), copies = q_BHNd.shape, blocks.copies
        positions = length // copies

        def as_heads(x: Tensor) -> Tensor:  # (B, H, n*S, ...) -> (B, H*n, S, ...)
            return x.reshape(batch, heads * copies, positions, *x.shape[3:])

        k_BGSd, v_BGSd = k_BGNd[:, :, :positions], v_BGNd[:, :, :positions]
        of_queries = as_heads(q_BHNd), k_BGSd, v_BGSd, as_heads(out_BHNd), as_heads(lse_BHN)
        if ctx.originals is None:
            dq, dk, dv = partial_attention_backward(as_heads(gradient_BHNd), *of_queries, None, is_causal=True)
        else:
            dq, dk, dv = partial_blocks_backward(as_heads(gradient_BHNd), *of_queries, ctx.originals)
        q, k, v, mask = _in_blocks(q_BHNd, k_BGNd, v_BGNd, blocks)
        near_lse = _to_blocks(lse_BHN.unsqueeze(-1), blocks).squeeze(-1)
        near_dq, near_dk, near_dv = partial_attention_backward(
            _to_blocks(gradient_BHNd, blocks), q, k, v, _to_blocks(out_BHNd, blocks), near_lse, mask, False
        )
        dq_BHNd = dq.reshape(q_BHNd.shape)  # a new tensor
        dq_BHNd[:, :, positions:] += _from_blocks(near_dq, batch, positions, blocks)
        dk_BGNd = torch.cat((dk, _keys_from_blocks(near_dk, batch, positions, blocks)), dim=2)
        dv_BGNd = torch.cat((dv, _keys_from_blocks(near_dv, batch, positions, blocks)), dim=2)
        return dq_BHNd, dk_BGNd, dv_BGNd, None, None


def _in_blocks(
    q_BHNd: Tensor, k_BGNd: Tensor, v_BGNd: Tensor, blocks: HiddenBlocks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden queries, the hidden keys and values that blocks see, and their mask, with blocks as the batch."""
    batch, (rows, number, queries, keys) = len(q_BHNd), blocks.visible.shape
    mask = additive(blocks.visible, q_BHNd.dtype)
    mask = mask.expand(batch, -1, -1, -1) if rows == 1 else mask
    mask = mask.reshape(batch * number, 1, queries, keys)
    return (
        _to_blocks(q_BHNd, blocks),
        _with_block_before(_to_blocks(k_BGNd, blocks), number, blocks),
        _with_block_before(_to_blocks(v_BGNd, blocks), number, blocks),
        mask,
    )


def _to_blocks(x_BHNd: Tensor, blocks: HiddenBlocks) -> Tensor:
    """Cut the hidden part of a stream into blocks. (B, H, (1 + c)*S, d) -> (B*b, H, s*c, d)."""
    positions = x_BHNd.shape[2] // blocks.copies
    x_BHcSd = x_BHNd[:, :, positions:].unflatten(2, (blocks.copies - 1, positions))
    if positions % blocks.size:  # a pad of nothing would copy
        x_BHcSd = F.pad(x_BHcSd, (0, 0, 0, -positions % blocks.size))
    x_BHcbsd = x_BHcSd.unflatten(3, (-1, blocks.size))
    return x_BHcbsd.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(0, 1).contiguous()


def _from_blocks(x: Tensor, batch: int, positions: int, blocks: HiddenBlocks) -> Tensor:
    """Put blocks back in the order of the stream. (B*b, H, s*c, d) -> (B, H, c*S, d)."""
    x_BbHscd = x.unflatten(2, (blocks.size, blocks.copies - 1)).unflatten(0, (batch, -1))
    x_BHcSd = x_BbHscd.permute(0, 2, 4, 1, 3, 5).flatten(3, 4)[:, :, :, :positions]
    return x_BHcSd.flatten(2, 3)


def _with_block_before(x: Tensor, number: int, blocks: HiddenBlocks) -> Tensor:
    """Put before each block's keys those of the block before. (B*b, G, s*c, d) -> (B*b, G, 2*s*c, d)."""
    if not blocks.looks_back:
        return x
    own = x.unflatten(0, (-1, number))
    length = own.shape[3]
    joined = own.new_zeros((*own.shape[:3], 2 * length, own.shape[4]))
    joined[:, :, :, length:] = own
    joined[:, 1:, :, :length] = own[:, :-1]
    return joined.flatten(0, 1)


def _keys_from_blocks(x: Tensor, batch: int, positions: int, blocks: HiddenBlocks) -> Tensor:
    """Add up the gradients of keys from the blocks that see them. (B*b, G, (1 or 2)*s*c, d) -> (B, G, c*S, d)."""
    if blocks.looks_back:
        before, own = x.unflatten(0, (batch, -1)).chunk(2, dim=3)
        own[:, :-1] += before[:, 1:]
        x = own.flatten(0, 1)
    return _from_blocks(x, batch, positions, blocks)
