"""Blocks of attention over a sequence that several ranks share: which of a rank's queries meet which keys of another.

The row is cut into 2P chunks for P ranks, and rank r has chunks r and 2P - 1 - r, in this order (zigzag). So every rank
has the same number of visible pairs under a causal mask. Blocks are merged by their logsumexp; the gradients of a block
come from the merged output (see partial_attention.py).

Source: layout and merge of github.com/zhuzilin/ring-flash-attention; Liu et al. 2023, arXiv 2310.01889.
Legend: B batch, H query heads, G key/value heads, S tokens of the row, s tokens of a rank, d head size, P ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_train.ops.attention import visible_keys
from moe_train.ops.partial_attention import (
    additive,
    merge_attention,
    partial_attention,
    partial_attention_backward,
)

_MOST_QUERIES = 512  # queries of a block, with documents or a window


@dataclass(frozen=True)
class Reach:
    """How far back the tokens of a row see, known on the host. Positions are those in the row.

    Attributes:
        first_S: int64, first position of the token's document; of several rows, the least.
        last_first_S: int64, the same; of several rows, the greatest.
    """

    first_S: np.ndarray
    last_first_S: np.ndarray

    @staticmethod
    def of(offsets_BS: np.ndarray) -> "Reach":
        """Make the reach of documents.

        Args:
            offsets_BS: int64 positions counted from the first token of the token's document.
        """
        first_BS = np.arange(offsets_BS.shape[1]) - offsets_BS
        return Reach(first_BS.min(0), first_BS.max(0))

    @staticmethod
    def of_whole_row(length: int) -> "Reach":
        """Make the reach of a row that is one document."""
        zeros_S = np.zeros(length, dtype=np.int64)
        return Reach(zeros_S, zeros_S)


@dataclass(frozen=True)
class Block:
    """Block of queries of this rank and keys of one rank.

    Attributes:
        queries: Places among this rank's tokens.
        keys: Places among the tokens of the keys' rank.
        is_causal: Whether a query sees the keys up to its own place, instead of all keys.
        is_first: Whether no other block of these queries comes before. Each query sees a key of its first block.
        masked_from: Positions in the row of the first query and of the first key, if not every pair is visible; queries
            and keys have consecutive positions. None: a mask is not needed.
    """

    queries: slice
    keys: slice
    is_causal: bool = False
    is_first: bool = False
    masked_from: tuple[int, int] | None = None


def zigzag_spans(length: int, size: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the two ranges of positions that a rank has, each as its first position and the one after its last.

    Args:
        length: S, tokens of the row; divisible by 2P.
        size: P, number of ranks.
        rank: Rank in the group.
    """
    chunk = length // (2 * size)
    return (rank * chunk, (rank + 1) * chunk), ((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk)


def causal_blocks(length: int, size: int, rank: int, source: int) -> tuple[Block, ...]:
    """List the blocks of a rank's queries with the keys of another, if a query sees all positions up to its own.

    Args:
        length: S, tokens of the row.
        size: P, number of ranks.
        rank: Rank of the queries.
        source: Rank of the keys.
    """
    part, half = length // size, length // (2 * size)
    if source == rank:  # positions increase over a rank's tokens, so that its own keys need no mask
        return (Block(slice(0, part), slice(0, part), is_causal=True, is_first=True),)
    if source < rank:
        return (Block(slice(0, part), slice(0, half)),)
    return (Block(slice(half, part), slice(0, part)),)


def reached_blocks(length: int, size: int, rank: int, source: int, reach: Reach, window: int | None) -> Iterator[Block]:
    """Yield the blocks of a rank's queries with the keys of another, with documents or a window.

    Queries are taken in turns of some hundred, and each turn meets only the keys that one of its queries may see. Keys
    that all of them see need no mask. So the work grows with what is visible, not with the square of the length, and a
    mask has some hundred queries and keys, unless documents of several rows begin at different places.

    Args:
        length: S, tokens of the row.
        size: P, number of ranks.
        rank: Rank of the queries.
        source: Rank of the keys.
        reach: How far back documents let each token see.
        window: Most positions that a query sees, its own included; None: all.
    """
    chunk = length // (2 * size)
    for number, (begin, end) in enumerate(zigzag_spans(length, size, rank)):
        spans = list(enumerate(zigzag_spans(length, size, source)))
        if source == rank:  # first the keys next to the queries: every query sees itself
            spans.sort(key=lambda each: each[0] != number)
        for first, last in _turns(begin, end, reach):
            queries = slice(number * chunk + first - begin, number * chunk + last - begin + 1)
            lowest = max(int(reach.first_S[first]), 0 if window is None else first - window + 1)
            # All queries see keys from here to the first query.
            clear = max(int(reach.last_first_S[last]), 0 if window is None else last - window + 1)
            for place, (start, stop) in spans:
                low, high = max(lowest, start), min(last + 1, stop)
                for part, (begin_k, end_k, needs_mask) in enumerate(_parts(low, high, clear, first)):
                    is_first = source == rank and place == number and part == 0
                    keys = slice(place * chunk + begin_k - start, place * chunk + end_k - start)
                    yield Block(queries, keys, False, is_first, (first, begin_k) if needs_mask else None)


def _turns(begin: int, end: int, reach: Reach) -> Iterator[tuple[int, int]]:
    """Cut a range of queries into turns, each as its first and last position; a long document has turns of its own."""
    first = begin
    while first < end:
        last = min(first + _MOST_QUERIES, end) - 1
        document = int(reach.first_S[first])
        if first - document >= _MOST_QUERIES:  # else the mask of its keys is small
            last = min(last, int(np.searchsorted(reach.first_S, document, side="right")) - 1)
        yield first, last
        first = last + 1


def _parts(low: int, high: int, clear: int, first: int) -> list[tuple[int, int, bool]]:
    """Cut a range of keys where masks begin and end to be needed, the last keys first.

    Args:
        low: First key that a query of the turn sees.
        high: The key after the last.
        clear: First key that all queries see.
        first: Position of the first query, which sees no later key.

    Returns:
        First key, the key after the last, and whether a mask is needed.
    """
    if low >= high:
        return []
    begin, end = max(low, clear), min(high, first)
    if end - begin < min(_MOST_QUERIES, high - low):  # a mask costs less than one more call
        return [(low, high, True)]
    parts = [(end, high, True), (begin, end, False), (low, begin, True)]
    return [part for part in parts if part[0] < part[1]]


@dataclass(frozen=True)
class RowVisibility:
    """Which keys the queries of a shared row see.

    Attributes:
        length: S, tokens of the row.
        window: Most positions that a query sees, its own included; None: all.
        documents_BS: int64 document ids of the whole row; None: documents are not isolated.
        reach: How far back documents let each token see; None: as far as the row.
    """

    length: int
    window: int | None = None
    documents_BS: Tensor | None = None
    reach: Reach | None = None

    def blocks(self, size: int, rank: int, source: int) -> tuple[Block, ...]:
        """List the blocks of a rank's queries with the keys of another rank of P."""
        if self.reach is None and (self.window is None or self.window >= self.length):
            return causal_blocks(self.length, size, rank, source)
        reach = self.reach or Reach.of_whole_row(self.length)
        return tuple(reached_blocks(self.length, size, rank, source, reach, self.window))

    def mask(self, block: Block, device: torch.device) -> Tensor | None:
        """Make the mask of a block, bool [B or 1, 1, queries, keys]; None: it needs none."""
        if block.masked_from is None:
            return None
        queries, keys = (
            slice(begin, begin + places.stop - places.start)
            for begin, places in zip(block.masked_from, (block.queries, block.keys), strict=True)
        )
        positions_1S, documents_BS = torch.arange(self.length, device=device).unsqueeze(0), self.documents_BS
        return visible_keys(
            positions_1S[:, queries],
            positions_1S[:, keys],
            None if documents_BS is None else documents_BS[:, queries],
            None if documents_BS is None else documents_BS[:, keys],
            self.window,
        )


class MergedAttention:
    """Attention of a rank's queries that is merged block by block, fp32 or wider."""

    def __init__(self, q_BHsd: Tensor, visibility: RowVisibility) -> None:
        self._q_BHsd, self._visibility = q_BHsd, visibility
        wide = torch.promote_types(q_BHsd.dtype, torch.float32)
        self.out_BHsd = q_BHsd.new_empty(q_BHsd.shape, dtype=wide)
        self.lse_BHs = q_BHsd.new_empty(q_BHsd.shape[:3], dtype=wide)

    def add(self, block: Block, k_BGsd: Tensor, v_BGsd: Tensor) -> None:
        """Take in the keys and values of a block; they are those of all tokens of their rank."""
        q = self._q_BHsd[:, :, block.queries]
        visible = self._visibility.mask(block, q.device)
        mask = None if visible is None else additive(visible, q.dtype)
        out, lse = partial_attention(q, k_BGsd[:, :, block.keys], v_BGsd[:, :, block.keys], mask, block.is_causal)
        if visible is not None:  # the kernels give such a row the output 0, and an arbitrary logsumexp
            lse = lse.masked_fill(~visible.any(-1), -math.inf)
        held, held_lse = self.out_BHsd[:, :, block.queries], self.lse_BHs[:, :, block.queries]
        if not block.is_first:
            out, lse = merge_attention(held, held_lse, out, lse)
        held.copy_(out)
        held_lse.copy_(lse)


class BlockGradients:
    """Gradients of a rank's queries, added up over blocks, and those of the keys and values of each block."""

    def __init__(
        self, gradient_BHsd: Tensor, q_BHsd: Tensor, out_BHsd: Tensor, lse_BHs: Tensor, visibility: RowVisibility
    ) -> None:
        self._of_queries = gradient_BHsd, q_BHsd, out_BHsd, lse_BHs
        self._visibility = visibility
        wide = torch.promote_types(q_BHsd.dtype, torch.float32)
        self.dq_BHsd = q_BHsd.new_zeros(q_BHsd.shape, dtype=wide)

    def add(self, block: Block, k_BGsd: Tensor, v_BGsd: Tensor, dk_BGsd: Tensor, dv_BGsd: Tensor) -> None:
        """Add a block's gradients to those of the queries, and to dk and dv, which are fp32 or wider."""
        gradient, q, out, lse = (tensor[:, :, block.queries] for tensor in self._of_queries)
        visible = self._visibility.mask(block, q.device)
        mask = None if visible is None else additive(visible, q.dtype)
        keys = block.keys
        dq, dk, dv = partial_attention_backward(
            gradient.contiguous(),
            q,
            k_BGsd[:, :, keys],
            v_BGsd[:, :, keys],
            out.contiguous(),
            lse.contiguous(),
            mask,
            block.is_causal,
        )
        self.dq_BHsd[:, :, block.queries] += dq
        dk_BGsd[:, :, keys] += dk
        dv_BGsd[:, :, keys] += dv
