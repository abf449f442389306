"""Attention over whole rows by blocks of queries, each with the keys that it can see: no mask of all pairs of tokens.

A document without a window is one block, which is causal and needs no mask; the queries of a window are cut into
blocks, each of which sees its own keys and those of the window before. Only the mask of one block exists at a time, in
the backward pass too, so that memory is linear in the length of the rows. Where the kernel for rows of any length fits
(CUDA, 16 bits), it takes the place of the blocks.
Legend: B batch, R rows of positions (B or 1), H query heads, G key/value heads, S positions, N documents, n blocks,
d head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from moe_train.ops.attention import visible_keys
from moe_train.ops.partial_attention import additive, partial_attention, partial_attention_backward, takes_long_rows
from moe_train.ops.varlen_attention import takes_varlen, varlen_attention

# Queries of a block. Fewer take longer than they save; more see more keys that only other queries of the block need.
LEAST_BLOCK, MOST_BLOCK = 64, 512
_ALL_ROWS = 1 << 31  # end of a range of rows that goes to the last


@dataclass(frozen=True)
class AttentionBlocks:
    """Which keys each query of whole rows sees, and the blocks in which this is computed.

    Attributes:
        table_n7: int64, on the host: first row and end, first query and end, first key and end, and whether the block
            needs a mask (1) or is causal without one (0). Every query is in one block.
        positions_RS: int64 positions of the tokens.
        documents_RS: int64 ids of the documents; None: they are not isolated.
        window: Most positions that a query sees, its own included; None: all.
        longest: Tokens of the longest document, if the kernel for rows of any length takes these rows; 0: it does not.
        starts_N: int32 places in the flattened batch at which documents begin, then B*S, for that kernel; None: every
            row is one document.
    """

    table_n7: Tensor
    positions_RS: Tensor
    documents_RS: Tensor | None
    window: int | None
    longest: int = 0
    starts_N: Tensor | None = None


@dataclass(frozen=True)
class _Block:
    rows: slice
    queries: slice
    keys: slice
    mask: Tensor | None  # added to the scores; None: the block is causal


def block_of_window(window: int) -> int:
    """Count the queries of a block of a window.

    Args:
        window: Most positions that a query sees, its own included.
    """
    return min(max(window, LEAST_BLOCK), MOST_BLOCK)


def rows_of_documents(
    length: int,
    starts: Sequence[int] | None,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> AttentionBlocks:
    """Cut whole rows, whose tokens are in the order of their positions, into blocks.

    Args:
        length: S, tokens of a row.
        starts: Places in the flattened batch at which documents begin, then B*S, known on the host; None: every row is
            one document.
        window: Most positions that a query sees, its own included; None: all.
        device: Device of the model.
        dtype: dtype of queries and keys.
        head_dim: d, head size.
    """
    most = None if takes_long_rows(device, dtype, head_dim) else MOST_BLOCK
    is_varlen = takes_varlen(device, dtype, head_dim)
    positions_1S = torch.arange(length, device=device).unsqueeze(0)
    if starts is None:
        table = [(0, _ALL_ROWS, *piece) for piece in _pieces([0, length], window, most)]
        return AttentionBlocks(torch.tensor(table), positions_1S, None, window, length if is_varlen else 0)
    rows = _bounds_of_rows(length, starts)
    table, row = [], 0
    for bounds, same in groupby(rows):
        end = row + len(list(same))
        table += [(row, end, *piece) for piece in _pieces(bounds, window, most)]
        row = end
    sizes = [end - first for first, end in pairwise(starts)]
    # A document's id is its number, so that every run of equal ids is a document of its own.
    documents_T = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes), output_size=starts[-1])
    documents_BS = documents_T.view(len(rows), length).to(device, non_blocking=True)
    starts_N = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True) if is_varlen else None
    longest = max(sizes) if is_varlen else 0
    return AttentionBlocks(torch.tensor(table), positions_1S, documents_BS, window, longest, starts_N)


def rows_of_positions(positions_RS: Tensor, documents_RS: Tensor | None, window: int | None) -> AttentionBlocks:
    """Cut whole rows, whose tokens may be in any order, into blocks of queries that are compared with all keys.

    Args:
        positions_RS: int64 positions of the tokens.
        documents_RS: int64 ids of the documents; None: they are not isolated.
        window: Most positions that a query sees, its own included; None: all.
    """
    length = positions_RS.shape[1]
    table = [
        (0, _ALL_ROWS, first, min(first + MOST_BLOCK, length), 0, length, 1) for first in range(0, length, MOST_BLOCK)
    ]
    return AttentionBlocks(torch.tensor(table), positions_RS, documents_RS, window)


def attend_blocks(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, blocks: AttentionBlocks) -> Tensor:
    """Compute the attention of whole rows; query head i reads key/value head i // (H/G).

    Args:
        q_BHSd: Queries.
        k_BGSd: Keys; G must divide H.
        v_BGSd: Values.
        blocks: Which keys each query sees.

    Returns:
        [B, H, S, d], the outputs of all heads.
    """
    if blocks.longest:
        starts_N = blocks.starts_N
        if starts_N is None:
            batch, _, length, _ = q_BHSd.shape
            starts_N = torch.arange(batch + 1, dtype=torch.int32, device=q_BHSd.device) * length
        return varlen_attention(q_BHSd, k_BGSd, v_BGSd, starts_N, blocks.longest, blocks.window)
    fields = _fields(blocks)
    if torch.compiler.is_compiling():
        return _attend_op(q_BHSd, k_BGSd, v_BGSd, *fields)[0]
    return _BlockAttention.apply(q_BHSd, k_BGSd, v_BGSd, *fields)


def partial_blocks(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, blocks: AttentionBlocks) -> tuple[Tensor, Tensor]:
    """Compute attention as `attend_blocks`, and the logsumexp [B, H, S] of its scores, without a gradient."""
    compute = _attend_op if torch.compiler.is_compiling() else _forward
    return compute(q_BHSd, k_BGSd, v_BGSd, *_fields(blocks))


def partial_blocks_backward(
    gradient_BHSd: Tensor,
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    out_BHSd: Tensor,
    lse_BHS: Tensor,
    blocks: AttentionBlocks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values of `partial_blocks`, as `partial_attention_backward` does."""
    compute = _backward_op if torch.compiler.is_compiling() else _backward
    return compute(gradient_BHSd, q_BHSd, k_BGSd, v_BGSd, out_BHSd, lse_BHS, *_fields(blocks))


def _fields(blocks: AttentionBlocks) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
    """Return the blocks as arguments of an operation, which takes tensors and numbers."""
    return blocks.table_n7, blocks.positions_RS, blocks.documents_RS, blocks.window


def _bounds_of_rows(length: int, starts: Sequence[int]) -> list[list[int]]:
    """Return the first columns of each row's documents, and the end of the row."""
    rows: list[list[int]] = [[] for _ in range(starts[-1] // length)]
    for start in starts[:-1]:
        rows[start // length].append(start % length)
    return [[*bounds, length] for bounds in rows]


def _pieces(bounds: Sequence[int], window: int | None, most: int | None) -> list[tuple[int, int, int, int, int]]:
    """Cut one row into blocks: first query and end, first key and end, and whether a mask is needed."""
    pieces: list[tuple[int, int, int, int, int]] = []
    for first, end in pairwise(bounds):
        is_narrow = window is not None and window < end - first
        size = block_of_window(window) if window is not None and is_narrow else most or end - first
        for query in range(first, end, size):
            stop = min(query + size, end)
            key = max(first, query - window + 1) if window is not None else first
            is_masked = key != query or (window is not None and window < stop - query)
            before = pieces[-1] if pieces else None
            # Documents of a few tokens are cheaper together, under a mask.
            if before and key == query and before[0] == before[2] and stop - before[0] <= LEAST_BLOCK:
                pieces[-1] = (before[0], stop, before[0], stop, 1)
            else:
                pieces.append((query, stop, key, stop, int(is_masked)))
    return pieces


def _walk(dtype: torch.dtype, table_n7: Tensor, *index: Any) -> Iterator[_Block]:
    """Yield the blocks, with the mask of each, which is formed when the block is."""
    for row, row_end, query, query_end, key, key_end, is_masked in table_n7.tolist():
        rows, queries, keys, mask = slice(row, row_end), slice(query, query_end), slice(key, key_end), None
        if is_masked:
            mask = additive(_visible(rows, queries, keys, *index), dtype)
        yield _Block(rows, queries, keys, mask)


def _visible(
    rows: slice, queries: slice, keys: slice, positions_RS: Tensor, documents_RS: Tensor | None, window: int | None
) -> Tensor:
    def part(x_RS: Tensor, columns: slice) -> Tensor:
        return (x_RS[rows] if len(x_RS) > 1 else x_RS)[:, columns]

    positions = part(positions_RS, queries), part(positions_RS, keys)
    if documents_RS is None:
        return visible_keys(*positions, None, None, window)
    return visible_keys(*positions, part(documents_RS, queries), part(documents_RS, keys), window)


def _new_outputs(q_BHSd: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = q_BHSd.shape
    wide = torch.promote_types(q_BHSd.dtype, torch.float32)
    # The heads of a token adjoin in memory, as the map behind attention takes them.
    out_BHSd = q_BHSd.new_empty(batch, length, heads, size).transpose(1, 2)
    return out_BHSd, q_BHSd.new_empty(batch, heads, length, dtype=wide)


def _forward(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    out_BHSd, lse_BHS = _new_outputs(q_BHSd)
    for block in _walk(q_BHSd.dtype, *fields):
        rows, queries, keys = block.rows, block.queries, block.keys
        out_BHSd[rows, :, queries], lse_BHS[rows, :, queries] = partial_attention(
            q_BHSd[rows, :, queries], k_BGSd[rows, :, keys], v_BGSd[rows, :, keys], block.mask, block.mask is None
        )
    return out_BHSd, lse_BHS


def _backward(
    gradient_BHSd: Tensor,
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    out_BHSd: Tensor,
    lse_BHS: Tensor,
    *fields: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_BHSd = torch.empty_like(q_BHSd)
    # Several blocks add to the gradient of a key: in at least fp32, and rounded once.
    wide = torch.promote_types(k_BGSd.dtype, torch.float32)
    dk_BGSd, dv_BGSd = (torch.zeros_like(x_BGSd, dtype=wide) for x_BGSd in (k_BGSd, v_BGSd))
    for block in _walk(q_BHSd.dtype, *fields):
        rows, queries, keys = block.rows, block.queries, block.keys
        dq_BHSd[rows, :, queries], dk, dv = partial_attention_backward(
            gradient_BHSd[rows, :, queries],
            q_BHSd[rows, :, queries],
            k_BGSd[rows, :, keys],
            v_BGSd[rows, :, keys],
            out_BHSd[rows, :, queries],
            lse_BHS[rows, :, queries],
            block.mask,
            block.mask is None,
        )
        dk_BGSd[rows, :, keys] += dk
        dv_BGSd[rows, :, keys] += dv
    return dq_BHSd, dk_BGSd.to(k_BGSd.dtype), dv_BGSd.to(v_BGSd.dtype)


class _BlockAttention(torch.autograd.Function):
    """Attention by blocks; it keeps queries, keys, values, output and logsumexp, and no block's scores or mask."""

    @staticmethod
    def forward(ctx: Any, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *fields: Any) -> Tensor:
        out_BHSd, lse_BHS = _forward(q_BHSd, k_BGSd, v_BGSd, *fields)
        _keep(ctx, (q_BHSd, k_BGSd, v_BGSd, *fields), (out_BHSd, lse_BHS))
        return out_BHSd

    @staticmethod
    def backward(ctx: Any, gradient_BHSd: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_backward(gradient_BHSd, *ctx.saved_tensors, ctx.window), None, None, None, None


# The same two functions as operations that torch.compile takes as they are: it would trace the loop over the blocks of
# one batch, and compile it again for the documents of the next.
@torch.library.custom_op("moe_train::attend_blocks", mutates_args=())
def _attend_op(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    table_n7: Tensor,
    positions_RS: Tensor,
    documents_RS: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    return _forward(q_BHSd, k_BGSd, v_BGSd, table_n7, positions_RS, documents_RS, window)


@_attend_op.register_fake
def _(q_BHSd: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _new_outputs(q_BHSd)


@torch.library.custom_op("moe_train::attend_blocks_backward", mutates_args=())
def _backward_op(
    gradient_BHSd: Tensor,
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    out_BHSd: Tensor,
    lse_BHS: Tensor,
    table_n7: Tensor,
    positions_RS: Tensor,
    documents_RS: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = gradient_BHSd, q_BHSd, k_BGSd, v_BGSd, out_BHSd, lse_BHS
    return _backward(*tensors, table_n7, positions_RS, documents_RS, window)


@_backward_op.register_fake
def _(gradient_BHSd: Tensor, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q_BHSd), torch.empty_like(k_BGSd), torch.empty_like(v_BGSd)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BHSd, k_BGSd, v_BGSd, table_n7, positions_RS, documents_RS, window = inputs
    ctx.save_for_backward(q_BHSd, k_BGSd, v_BGSd, *output, table_n7, positions_RS, documents_RS)
    ctx.window = window


def _op_gradients(ctx: Any, gradient_BHSd: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(gradient_BHSd, *ctx.saved_tensors, ctx.window), None, None, None, None


_attend_op.register_autograd(_op_gradients, setup_context=_keep)
