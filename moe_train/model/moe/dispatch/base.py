"""Interface of dispatchers, which bring token rows to their experts and the experts' outputs back.

    chunks = dispatcher.plan(x_TD, routing)                          # tell the other ranks how many rows to expect
    pending = dispatcher.start(chunk)                                # send a chunk's rows
    dispatched = pending.wait()                                      # rows at the experts of this rank
    pending = dispatcher.start_combine(outputs_ND, dispatched)       # send the experts' weighted outputs back
    y_tD = pending.wait()                                            # the sum of each token's outputs

Work between a start and its wait hides the all-to-all; the backward pass waits and starts in the mirrored order (see
distributed/all_to_all.py). Every rank of the groups makes all of these calls in the same order, even without rows.
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
    """Rows of a chunk at their experts.

    Attributes:
        rows_ND: Rows that arrived.
        assignments: Assignments of the rows to this rank's experts.
        sent: What the dispatcher needs to send the outputs back.
    """

    rows_ND: Tensor
    assignments: Assignments
    sent: Any


class PendingDispatch(Protocol):
    """Rows of a chunk on their way to the experts."""

    def wait(self) -> Dispatched:
        """Wait for the rows that the other ranks sent."""


class PendingCombine(Protocol):
    """Outputs of a chunk on their way back."""

    def wait(self) -> Tensor:
        """Wait for the outputs, and add up those of each token. [t, D]."""


class Dispatcher(Protocol):
    """A way for token rows to reach experts on other ranks."""

    def plan(self, x_TD: Tensor, routing: Routing) -> Sequence[Any]:
        """Cut the tokens into chunks, and tell the other ranks how many rows each will bring.

        Args:
            x_TD: Token rows of this rank.
            routing: Decision of the router.

        Returns:
            Chunks for `start`, in order; at least one.

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
    """Settings that a dispatcher is built from.

    Attributes:
        groups: Process groups that a token passes on its way to its experts, one after the other. Each rank of a group
            leads to a range of consecutive experts, and all ranges have the same length.
        num_chunks: Number of chunks of a micro-batch's tokens; the same on all ranks.
        payload: Number format in which rows travel.
        observer: Observer of the layer's all-to-alls.
    """

    groups: tuple[Group, ...]
    num_chunks: int = 1
    payload: Payload = MODEL_PAYLOAD
    observer: CommObserver = UNOBSERVED


@dataclass(frozen=True)
class DispatcherKind:
    """Description of a kind of dispatcher.

    Attributes:
        build: Function that makes the dispatcher of a layer.
        hops: Function that gives the traffic of each hop, in order, for the planner.
        merges_rows: Whether a token's assignments on one rank share a row, which is useless if a token has one expert.
        leaves_nodes_once: Whether rows go across nodes first and then within a node, with one group for each.
    """

    build: Callable[[DispatchSpec], Dispatcher]
    hops: Callable[[DispatchSizes], tuple[Hop, ...]]
    merges_rows: bool = False
    leaves_nodes_once: bool = False


def split_routing(routing: Routing, num_chunks: int) -> list[Routing]:
    """Split the router's decision into consecutive chunks of the tokens. The sums stay those of all tokens."""
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
    """Compute the number of tokens of each chunk; the numbers differ by one at most."""
    ends = [number * num_tokens // num_chunks for number in range(num_chunks + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class ExpertOrder:
    """A chunk's assignments in the order of their experts; those that are not executed come last.

    Attributes:
        routing: Decision of the router.
        order_A: int64, assignment at each place.
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
        """Return all assignments of the chunk; `Assignments.first` can then take those that are executed."""
        num_tokens, top_k = self.routing.experts_TK.shape
        gates_A = self.routing.gates_TK.reshape(-1).gather(0, self.order_A)
        if self.routing.kept_TK is None:
            return Assignments(RowMap.of_order(self.order_A, top_k), gates_A, self.counts_E)
        return Assignments(RowMap.of(self.order_A // top_k, num_tokens), gates_A, self.counts_E)
