"""The interface of dispatchers, which bring token rows to their experts and the experts' outputs back.

    chunks = dispatcher.plan(x_TD, routing)                          # tell the other ranks how many rows to expect
    pending = dispatcher.start(chunk)                                # send a chunk's rows
    dispatched = pending.wait()                                      # rows at the experts of this rank
    pending = dispatcher.start_combine(outputs_ND, dispatched)       # send the experts' weighted outputs back
    y_tD = pending.wait()                                            # the sum of each token's outputs

What lies between a start and its wait hides the all-to-all; the backward pass waits and starts in the mirrored order
(see distributed/all_to_all.py). Every rank of the groups calls all of it in the same order, also with no rows.
Legend: T tokens of this rank, t tokens of a chunk, A assignments of a chunk, N rows at this rank's experts, E experts,
D hidden_size.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from moe_train.distributed.collectives import Group
from moe_train.distributed.observer import UNOBSERVED, CommObserver
from moe_train.model.cost import DispatchSizes, Hop
from moe_train.model.moe.steps import Assignments, Routing
from moe_train.ops.payload import MODEL_PAYLOAD, Payload
from moe_train.ops.permute import sort_assignments
from moe_train.ops.row_map import RowMap


@dataclass(frozen=True)
class Dispatched:
    """A chunk's rows at their experts.

    Attributes:
        rows_ND: Rows that arrived.
        assignments: Which of this rank's experts compute which rows.
        sent: What the dispatcher needs to send the outputs back.
    """

    rows_ND: Tensor
    assignments: Assignments
    sent: Any


class PendingDispatch(Protocol):
    """A chunk on its way to the experts."""

    def wait(self) -> Dispatched:
        """Wait for the rows that the other ranks sent."""


class PendingCombine(Protocol):
    """A chunk's outputs on their way back."""

    def wait(self) -> Tensor:
        """Wait for the outputs, and add up those of each token. [t, D]."""


class Dispatcher(Protocol):
    """A way for token rows to reach experts on other ranks."""

    def plan(self, x_TD: Tensor, routing: Routing) -> Sequence[Any]:
        """Cut the tokens into chunks, and tell the other ranks how many rows each will bring.

        Args:
            x_TD: Token rows of this rank.
            routing: The router's decision.

        Returns:
            Chunks for `start`, in their order; at least one.

        Collective: All ranks of the groups.
        """

    def start(self, chunk: Any) -> PendingDispatch:
        """Send a chunk's rows. Collective: all ranks of the groups."""

    def start_combine(self, rows_ND: Tensor, dispatched: Dispatched) -> PendingCombine:
        """Send the experts' weighted outputs back, in the order of dispatched.rows_ND.

        Collective: All ranks of the groups.
        """


@dataclass(frozen=True)
class DispatchSpec:
    """What a dispatcher is built from.

    Attributes:
        groups: Process groups that a token passes on its way to its experts, one after the other. The ranks of the
            first and their experts are cut into as many ranges.
        num_chunks: Chunks of a micro-batch's tokens; the same on all ranks.
        payload: The form in which rows travel.
        observer: Observer of the layer's all-to-alls.
    """

    groups: tuple[Group, ...]
    num_chunks: int = 1
    payload: Payload = MODEL_PAYLOAD
    observer: CommObserver = UNOBSERVED


@dataclass(frozen=True)
class DispatcherKind:
    """A kind of dispatcher, described by itself.

    Attributes:
        build: Makes the dispatcher of a layer.
        hops: What it sends, hop after hop, for the planner.
        merges_rows: Whether a token's assignments on one rank share a row: pointless where a token has one expert.
        leaves_nodes_once: Whether it takes rows across nodes first and then within a node: with groups of both kinds.
    """

    build: Callable[[DispatchSpec], Dispatcher]
    hops: Callable[[DispatchSizes], tuple[Hop, ...]]
    merges_rows: bool = False
    leaves_nodes_once: bool = False


def split_routing(routing: Routing, num_chunks: int) -> list[Routing]:
    """The router's decisions for consecutive chunks of the tokens. Their sums stay those of all tokens."""
    sizes = chunk_sizes(routing.experts_TK.shape[0], num_chunks)
    kept = [None] * num_chunks if routing.kept_TK is None else routing.kept_TK.split(sizes)
    names = ("gates_TK", "experts_TK", "logits_TE")
    # Not tensor_split: its backward pass makes a tensor of all tokens for each chunk, and adds them.
    parts = zip(*(getattr(routing, name).split(sizes) for name in names), strict=True)
    return [
        replace(routing, **dict(zip(names, part, strict=True)), kept_TK=own)
        for part, own in zip(parts, kept, strict=True)
    ]


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Tokens of each chunk; they differ by one at most."""
    ends = [number * num_tokens // num_chunks for number in range(num_chunks + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class ExpertOrder:
    """A chunk's assignments in the order of their experts; behind them those that are not executed.

    Attributes:
        routing: The router's decision.
        order_A: int64, the assignment at each place.
        counts_E: int64, executed assignments per expert.
    """

    routing: Routing
    order_A: Tensor
    counts_E: Tensor

    @staticmethod
    def of(routing: Routing) -> "ExpertOrder":
        """Sort a chunk's assignments by expert."""
        order_A, counts_E = sort_assignments(routing.experts_TK, routing.num_experts, routing.kept_TK)
        return ExpertOrder(routing, order_A, counts_E)

    def assignments(self) -> Assignments:
        """All of the chunk's assignments; `Assignments.first` leaves those that are executed."""
        num_tokens, top_k = self.routing.experts_TK.shape
        gates_A = self.routing.gates_TK.reshape(-1).gather(0, self.order_A)
        if self.routing.kept_TK is None:
            return Assignments(RowMap.of_order(self.order_A, top_k), gates_A, self.counts_E)
        return Assignments(RowMap.of(self.order_A // top_k, num_tokens), gates_A, self.counts_E)
