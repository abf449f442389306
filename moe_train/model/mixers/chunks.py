"""The two chunks of a rank that shares sequences, for layers that walk along the sequence.

Such a layer runs over its chunks as if each were a row of its own, from a state that the chunks before hand on.
Legend: B batch, s tokens of a rank, c = s/2 tokens of a chunk, P ranks, G key/value heads, d head size.
"""

import torch
from torch import Tensor

from moe_train.distributed.context import ContextRanks, gather_chunks
from moe_train.ops.compressive_memory import Memory, write


def split_chunks(x: Tensor) -> Tensor:
    """Make a row of each chunk. (B, s, ...) -> (2B, c, ...)."""
    return x.unflatten(1, (2, -1)).flatten(0, 1)


def join_chunks(x: Tensor) -> Tensor:
    """Undo `split_chunks`. (2B, c, ...) -> (B, s, ...)."""
    return x.unflatten(0, (-1, 2)).flatten(1, 2)


def all_chunks(own: Tensor, ranks: ContextRanks) -> Tensor:
    """Gather a value of every chunk of the rows, in their order. (2B, ...) -> (B, 2P, ...). Differentiable.

    Collective: All ranks that share the rows, in the backward pass too.
    """
    return gather_chunks(own.unflatten(0, (-1, 2)).transpose(0, 1), ranks).transpose(0, 1)


def own_chunks(chunks: Tensor, ranks: ContextRanks) -> Tensor:
    """Take the values of this rank's chunks. (B, 2P, ...) -> (2B, ...)."""
    return torch.stack((chunks[:, ranks.rank], chunks[:, -1 - ranks.rank]), dim=1).flatten(0, 1)


def memory_before(k_BcGd: Tensor, v_BcGd: Tensor, ranks: ContextRanks) -> Memory:
    """Compute the memory of all chunks before each of this rank's chunks, as the linear rule writes it. [2B, G, ...].

    Args:
        k_BcGd: Keys [2B, c, G, d] before the rotary embedding, for rows as `split_chunks` makes them.
        v_BcGd: Values.
        ranks: Ranks that share the rows.

    Collective: All ranks that share the rows, in the backward pass too.
    """
    filled_Bc = torch.ones(k_BcGd.shape[:2], dtype=torch.bool, device=k_BcGd.device)
    own = write(k_BcGd.transpose(1, 2), v_BcGd.transpose(1, 2), filled_Bc)
    chunks = all_chunks(torch.cat((own.matrix, own.total.unsqueeze(-1)), dim=-1), ranks)  # (B, 2P, G, d, d + 1)
    before = torch.cat((torch.zeros_like(chunks[:, :1]), chunks.cumsum(1)[:, :-1]), dim=1)
    mine = own_chunks(before, ranks)
    return Memory(mine[..., :-1], mine[..., -1])


def rows_before(x: Tensor, count: int, ranks: ContextRanks) -> Tensor:
    """Fetch the last rows of the chunk before each of this rank's chunks; zeros before the first. Differentiable.

    Args:
        x: Rows of this rank, [B, s, ...].
        count: K, number of rows; at most c.
        ranks: Ranks that share the rows.

    Returns:
        [2B, K, ...], for rows as `split_chunks` makes them.

    Collective: All ranks that share the rows, in the backward pass too.
    """
    last = all_chunks(split_chunks(x)[:, -count:], ranks)  # (B, 2P, K, ...)
    before = torch.cat((torch.zeros_like(last[:, :1]), last[:, :-1]), dim=1)
    return own_chunks(before, ranks)
