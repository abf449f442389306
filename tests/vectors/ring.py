"""Vectors of attention over ranks that share a sequence: on as many gloo ranks as each vector names, in both ways."""

import atexit
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_train.distributed.context import ContextRanks, ContextShard, ExchangeName
from moe_train.distributed.context_attention import attention_with_logsumexp
from moe_train.distributed.mesh import create_mesh
from moe_train.model.token_index import document_offsets
from moe_train.ops.ring_attention import Reach, RowVisibility
from tests.ranks import RankPool
from tests.vectors.layers import Quantity, Vector, numbers

MOST_RANKS = 16  # a file that asks for more is damaged
INPUTS = ("q", "k", "v", "grad")
EXCHANGES: tuple[ExchangeName, ...] = ("all_gather", "ring")
SECONDS = 120  # of one vector


def check(vector: Vector) -> Iterator[Quantity]:
    """Yield the layout, and outputs and gradients, plain and recomputed, by either exchange."""
    ranks, tensors = vector["ranks"], [numbers(vector[name]) for name in INPUTS]
    if type(ranks) is not int or not 1 <= ranks <= MOST_RANKS:
        raise ValueError(f"ranks ({ranks!r}) is not a number from 1 to {MOST_RANKS}")
    found = pool(ranks).run(run_rank, tensors, vector["documents"], vector["window"], timeout=SECONDS)
    columns = [columns for columns, _, _ in found]
    yield "zigzag", torch.stack(columns).double(), numbers(vector["zigzag"])
    yield "work", numbers([work for _, work, _ in found]), numbers(vector["work"])
    order = torch.cat(columns).argsort()
    for way in found[0][2]:
        parts = zip(*(results[way] for _, _, results in found), strict=True)
        for name, of_ranks in zip(("out", "lse", "dq", "dk", "dv"), parts, strict=True):
            yield f"{name} ({way})", torch.cat(of_ranks, dim=1)[:, order], numbers(vector[name])


@functools.cache
def pool(ranks: int) -> RankPool:
    """Ranks that are started once and end with this process."""
    made = RankPool(ranks)
    atexit.register(made.close)
    return made


def run_rank(
    rank: int, world_size: int, tensors: list[Tensor], documents: list[int] | None, window: int | None
) -> tuple[Tensor, int, dict[str, list[Tensor]]]:
    """Compute a rank's part: its columns, its visible pairs, and its results by the way they were found."""
    length = tensors[0].shape[1]
    mesh = create_mesh(1, SECONDS, context_size=world_size)
    assert mesh.context is not None, "there is a context group"
    documents_1S = None if documents is None else torch.tensor(documents)[None]
    reach = None if documents_1S is None else Reach.of(document_offsets(documents_1S).numpy())
    results: dict[str, list[Tensor]] = {}
    for exchange in EXCHANGES:
        ranks = ContextRanks(mesh.context.group, rank, world_size, exchange)
        shard = ContextShard(ranks, length, documents_1S, reach)
        columns = torch.from_numpy(ranks.columns(length))
        for recomputes in (False, True):
            q, k, v, grad = (tensor[None][:, :, columns] for tensor in tensors)
            own = [tensor.requires_grad_() for tensor in (q, k, v)]

            def attend(*inputs: Tensor, shard: ContextShard = shard) -> Any:
                return attention_with_logsumexp(*inputs, shard, window)

            out, lse = checkpoint(attend, *own, use_reentrant=True) if recomputes else attend(*own)
            out.backward(grad)
            way = f"{exchange}, recomputed" if recomputes else exchange
            gradients = [tensor.grad for tensor in own if tensor.grad is not None]
            results[way] = [each.detach()[0] for each in (out, lse, *gradients)]
    return columns, causal_pairs(length, world_size, rank), results


def causal_pairs(length: int, size: int, rank: int) -> int:
    """Count the pairs of a query of a rank and a key up to its position, documents and windows aside."""
    count = 0
    for block in (block for source in range(size) for block in RowVisibility(length).blocks(size, rank, source)):
        queries, keys = (part.stop - part.start for part in (block.queries, block.keys))
        count += queries * (queries + 1) // 2 if block.is_causal else queries * keys
    return count
