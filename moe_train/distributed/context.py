"""Context parallelism: ranks that share the tokens of a sequence, and how their keys and values meet.

All ways to exchange give the same numbers. `all_gather`: every rank gets the keys and values of all ranks at once, and
sends every rank the gradients of its own. `ring`: they travel from rank to rank, each block while another computes.
`gather_once`: the layer that makes keys and values gathers them for all layers that read them, and they are kept. Any
exchange of a layer sends (P - 1) X bytes in a forward pass, where X are the bytes of a rank's keys and values.
Legend: P ranks, B batch, G key/value heads, s tokens of a rank, d head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.distributed.collectives import Group
from moe_train.distributed.flight_recorder import CollectiveRecord, Direction
from moe_train.distributed.observer import UNOBSERVED, CommObserver
from moe_train.ops.pending import Pending
from moe_train.ops.ring_attention import Reach, zigzag_spans

ExchangeName = Literal["all_gather", "gather_once", "ring"]
AddGradients = Callable[[int, Tensor, Tensor], None]
"""Function of a rank, its keys and values [2, B, G, s, d], and a tensor of their shape to which it adds gradients."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it
_KEYS, _GRADIENTS = 0, 1  # tags of messages that may be on their way at the same time


@dataclass(frozen=True)
class ContextRanks:
    """Ranks that share sequences, as one of them sees it.

    Attributes:
        group: Process group; no other operations use it.
        rank: Rank of this process in the group.
        size: P, number of ranks.
        exchange: How keys and values reach the other ranks.
        observer: Observer of what is sent.
    """

    group: Group
    rank: int
    size: int
    exchange: ExchangeName = "all_gather"
    observer: CommObserver = UNOBSERVED

    def columns(self, length: int) -> np.ndarray:
        """List the positions that this rank has, ascending. int64 [S / P].

        Args:
            length: S, tokens of the row; divisible by 2P.
        """
        return np.concatenate([np.arange(*span, dtype=np.int64) for span in zigzag_spans(length, self.size, self.rank)])


@dataclass(frozen=True)
class ContextShard:
    """Part of the rows of a micro-batch that this rank has, and what it knows of the whole rows.

    Attributes:
        ranks: Ranks that share the rows.
        length: S, tokens of a whole row.
        documents_BS: int64 document ids of the whole rows; None: documents are not isolated.
        reach: How far back documents let each token see; None: as far as the row.
    """

    ranks: ContextRanks
    length: int
    documents_BS: Tensor | None = None
    reach: Reach | None = None

    def in_layer(self, layer: int) -> "ContextShard":
        """Let the observer name a layer of the model."""
        observer = replace(self.ranks.observer, layer=layer)
        return replace(self, ranks=replace(self.ranks, observer=observer))


def visit_key_values(
    own: Tensor, ranks: ContextRanks, direction: Direction = "forward"
) -> Iterator[tuple[int, Tensor]]:
    """Yield every rank of the group with its keys and values: first this rank, then those before it.

    Args:
        own: Keys and values of this rank, [2, B, G, s, d].
        ranks: Ranks that share the sequences.
        direction: Pass in which this happens, for the observer.

    Collective: All ranks of the group, which must take all that is yielded.
    """
    rank, size = ranks.rank, ranks.size
    if ranks.exchange != "ring":
        gathered = _gather(own, ranks, direction)
        yield from ((source, gathered[source]) for source in visiting_order(rank, size))
        return
    held = own.contiguous()
    for step, source in enumerate(visiting_order(rank, size)):
        pending = _rotate(held, ranks, _KEYS, direction) if step + 1 < size else None
        yield source, held
        if pending is not None:
            held = pending.wait()


def gather_gradients(own: Tensor, add_gradients: AddGradients, ranks: ContextRanks) -> Tensor:
    """Add up the gradients of this rank's keys and values over all ranks of the group.

    Args:
        own: Keys and values of this rank, [2, B, G, s, d].
        add_gradients: Function that computes this rank's share for the keys and values of any rank.
        ranks: Ranks that share the sequences.

    Returns:
        [2, B, G, s, d], fp32 or wider.

    Collective: All ranks of the group.
    """
    wide = torch.promote_types(own.dtype, torch.float32)
    if ranks.exchange != "ring":
        shares = own.new_zeros((ranks.size, *own.shape), dtype=wide)
        for source, held in visit_key_values(own, ranks, "backward"):
            add_gradients(source, held, shares[source])
        return _scatter_sum(shares, ranks)
    arriving: Pending[Tensor] | None = None
    for source, held in visit_key_values(own, ranks, "backward"):
        share = own.new_zeros(own.shape, dtype=wide)
        add_gradients(source, held, share)
        if arriving is not None:  # what the ranks before have added up for the same keys
            share += arriving.wait()
        arriving = _rotate(share, ranks, _GRADIENTS, "backward")
    assert arriving is not None, "there is a rank"
    return arriving.wait()


def gather_key_values(k_BGsd: Tensor, v_BGsd: Tensor, ranks: ContextRanks) -> tuple[Tensor, Tensor]:
    """Gather the keys and values of all ranks, for all layers that read them. Differentiable.

    Args:
        k_BGsd: Keys of this rank.
        v_BGsd: Values of this rank.
        ranks: Ranks that share the sequences.

    Returns:
        Keys and values of every rank, each [P, B, G, s, d].

    Collective: All ranks of the group, in the backward pass too.
    """
    gathered: Tensor = _Gather.apply(torch.stack((k_BGsd, v_BGsd)), ranks)
    return gathered[:, 0], gathered[:, 1]


def gather_chunks(own: Tensor, ranks: ContextRanks) -> Tensor:
    """Gather what every rank has of its two chunks, in the order of the row. Differentiable.

    Args:
        own: Values of this rank's chunks, the earlier first, [2, ...].
        ranks: Ranks that share the sequences.

    Returns:
        [2P, ...], the values of all chunks.

    Collective: All ranks of the group, in the backward pass too.
    """
    gathered: Tensor = _Gather.apply(own, ranks)
    return torch.cat((gathered[:, 0], gathered[:, 1].flip(0)))  # (P, 2, ...) -> (2P, ...)


class _Gather(torch.autograd.Function):
    """Gather; every rank's loss may depend on it, so the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: ContextRanks) -> Tensor:
        ctx.ranks, ctx.dtype = ranks, own.dtype
        return _gather(own, ranks, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(ctx.dtype, torch.float32)  # the sum over ranks is wide
        return _scatter_sum(grads[0].to(wide).contiguous(), ctx.ranks).to(ctx.dtype), None


def visiting_order(rank: int, size: int) -> list[int]:
    """List the ranks in the order in which their keys are seen: first this rank, then those before it."""
    return [(rank - step) % size for step in range(size)]


def _gather(own: Tensor, ranks: ContextRanks, direction: Direction) -> Tensor:
    """Gather a tensor of all ranks. [...] -> [P, ...]."""
    own = own.contiguous()
    gathered = own.new_empty((ranks.size, *own.shape))
    sizes = (own.numel(),) * ranks.size
    collective = CollectiveRecord("all_gather_keys", ranks.observer.layer, direction, sizes, sizes)
    with ranks.observer.starting(collective, (ranks.size - 1) * own.nbytes):
        work = _all_gather(gathered.flatten(), own.flatten(), group=ranks.group, async_op=True)  # views: gloo's form
    with ranks.observer.waiting(collective):
        work.wait()
    return gathered


def _scatter_sum(shares: Tensor, ranks: ContextRanks) -> Tensor:
    """Send every rank its part, and add up what arrives. [P, ...] -> [...].

    It is a reduce-scatter; an all-to-all, because the sum is then in the order of the ranks on every backend.
    """
    arriving, sizes = torch.empty_like(shares), (shares[0].numel(),) * ranks.size
    collective = CollectiveRecord("scatter_gradients", ranks.observer.layer, "backward", sizes, sizes)
    with ranks.observer.starting(collective, shares.nbytes - shares[0].nbytes):
        work = dist.all_to_all_single(arriving, shares, group=ranks.group, async_op=True)
    with ranks.observer.waiting(collective):
        work.wait()
    return arriving.sum(0)


def _rotate(tensor: Tensor, ranks: ContextRanks, tag: int, direction: Direction) -> Pending[Tensor]:
    """Send a contiguous tensor to the next rank of the ring, and receive that of the rank before."""
    if ranks.size == 1:
        return Pending(lambda: tensor)
    after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    arriving = torch.empty_like(tensor)
    sizes = (tuple(tensor.numel() * (rank == peer) for rank in range(ranks.size)) for peer in (after, before))
    collective = CollectiveRecord(("ring_keys", "ring_gradients")[tag], ranks.observer.layer, direction, *sizes)
    operations = [
        dist.P2POp(dist.isend, tensor, group=ranks.group, tag=tag, group_peer=after),
        dist.P2POp(dist.irecv, arriving, group=ranks.group, tag=tag, group_peer=before),
    ]
    with ranks.observer.starting(collective, tensor.nbytes):
        works = dist.batch_isend_irecv(operations)

    def finish() -> Tensor:
        with ranks.observer.waiting(collective):
            for work in works:
                work.wait()
        return arriving

    return Pending(finish)
