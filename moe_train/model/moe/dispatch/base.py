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
from moe_train.ops.pending import Pending
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

    def start(self, chunk: Any) -> Pending[Dispatched]:
        """Send a chunk's rows. Collective: all ranks of the groups."""

    def start_combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        """Send the experts' outputs back, each already multiplied by its gate, in the order of dispatched.rows_ND.

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


def assignments_of(routing: Routing) -> Assignments:
    """Sort a chunk's assignments by expert; behind those that are executed stand the others.

    `Assignments.first` leaves those that are executed, once the host knows their number.
    """
    num_tokens, top_k = routing.experts_TK.shape
    order_A, counts_E = sort_assignments(routing.experts_TK, routing.num_experts, routing.kept_TK)
    gates_A = routing.gates_TK.reshape(-1).gather(0, order_A)
    if routing.kept_TK is None:
        return Assignments(RowMap.of_order(order_A, top_k), gates_A, counts_E)
    return Assignments(RowMap.of(order_A // top_k, num_tokens), gates_A, counts_E)
