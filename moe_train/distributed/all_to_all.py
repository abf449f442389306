"""All-to-alls in the background: started, waited for later, with gradients that travel back in the same way.

Starting and waiting are two nodes of autograd's graph. In the backward pass the waiting node comes first: it starts the
gradient's all-to-all, and the starting node waits for it. What a forward pass does between the two, the backward pass
does between them too, in reverse: it hides its all-to-alls behind the same work.
Legend: R rows sent, Q rows received, D width of a row, P ranks of the group, n counts per rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.distributed.collectives import Group, group_rank
from moe_train.distributed.flight_recorder import CollectiveRecord, Direction
from moe_train.distributed.observer import UNOBSERVED, CommObserver
from moe_train.ops.payload import MODEL_PAYLOAD, Payload
from moe_train.ops.pending import Pending


@dataclass(frozen=True)
class Splits:
    """Number of rows for each rank and from each rank.

    Attributes:
        send: Rows for each rank of the group, in consecutive blocks. Zero is allowed.
        receive: Rows from each rank of the group.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]

    @property
    def back(self) -> "Splits":
        """Splits of the way back, with send and receive exchanged."""
        return Splits(self.receive, self.send)


class _Flight:
    """One all-to-all of rows, and later the all-to-all of their gradients."""

    def __init__(self, splits: Splits, group: Group, observer: CommObserver, payload: Payload) -> None:
        self._splits, self._group, self._observer, self._payload = splits, group, observer, payload
        self._work: dist.Work | None = None
        self._arriving: Tensor | None = None

    def start(self, rows_RD: Tensor, direction: Direction) -> None:
        """Start to send rows to the other ranks, without waiting."""
        collective = self._collective(direction)
        sent = self._payload.encode(rows_RD).contiguous()
        self._arriving = sent.new_empty((sum(collective.receive), sent.shape[1]))
        to_others = sum(collective.send) - collective.send[group_rank(self._group)]
        with self._observer.starting(collective, to_others * sent.shape[1] * sent.element_size()):
            self._work = dist.all_to_all_single(
                self._arriving, sent, list(collective.receive), list(collective.send), group=self._group, async_op=True
            )

    def finish(self, dtype: torch.dtype, direction: Direction) -> Tensor:
        """Return the rows that the other ranks sent, once they are here (on CUDA: for work queued after this call)."""
        assert self._work is not None and self._arriving is not None
        with self._observer.waiting(self._collective(direction)):
            self._work.wait()
        arrived, self._work, self._arriving = self._arriving, None, None
        return self._payload.decode(arrived, dtype)

    def _collective(self, direction: Direction) -> CollectiveRecord:
        splits = self._splits if direction == "forward" else self._splits.back
        return CollectiveRecord("all_to_all_rows", self._observer.layer, direction, splits.send, splits.receive)


class _Start(torch.autograd.Function):
    """Starting node; its result is an empty carrier of the graph: rows may travel as bytes, without gradient."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, ctx.dtype = flight, rows_RD.dtype
        flight.start(rows_RD, "forward")
        return rows_RD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.finish(ctx.dtype, "backward"), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.finish(carrier.dtype, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.start(grads[0], "backward")
        return grads[0].new_empty(0), None


def start_rows(
    rows_RD: Tensor, splits: Splits, group: Group, observer: CommObserver = UNOBSERVED, payload: Payload = MODEL_PAYLOAD
) -> Pending[Tensor]:
    """Send consecutive blocks of rows, block i to rank i of the group, without waiting; differentiable.

    Args:
        rows_RD: Rows in the order of their destination.
        splits: Rows for and from each rank, with sums R and Q.
        group: Process group.
        observer: Notified of the all-to-all, in the backward pass too.
        payload: Form in which the rows, and later their gradients, travel.

    Returns:
        Pending rows [Q, D] from the other ranks, in the order of their source; differentiable.

    Collective: All ranks of the group, also those that send or receive nothing, in the same order as all other
    collective operations of the group. The same holds in the backward pass, which starts the gradients' all-to-all
    where the forward pass waits.
    """
    flight = _Flight(splits, group, observer, payload)
    carrier = _Start.apply(rows_RD, flight)
    return Pending(lambda: _Finish.apply(carrier, flight))


def start_counts(counts_Pn: Tensor, group: Group, observer: CommObserver = UNOBSERVED) -> Pending[Tensor]:
    """Send row i of counts to rank i of the group, without waiting.

    Args:
        counts_Pn: int64 [P, n], one row for each rank.
        group: Process group.
        observer: Notified of the all-to-all.

    Returns:
        Pending counts from all ranks, int64 [P, n], in rank order.

    Collective: All ranks of the group, in the same order as all other collective operations of the group.
    """
    arriving_Pn = torch.empty_like(counts_Pn, memory_format=torch.contiguous_format)
    ones = (1,) * len(counts_Pn)
    collective = CollectiveRecord("all_to_all_counts", observer.layer, "forward", ones, ones)
    with observer.starting(collective, counts_Pn.nbytes - counts_Pn[0].nbytes):
        work = dist.all_to_all_single(arriving_Pn, counts_Pn.contiguous(), group=group, async_op=True)

    def finish() -> Tensor:
        with observer.waiting(collective):
            work.wait()
        return arriving_Pn

    return Pending(finish)
