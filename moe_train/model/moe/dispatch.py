"""Bringing token rows to their experts, on other ranks too, and the experts' outputs back.

flat: one row an assignment that is executed, in one all-to-all of uneven splits each way.
unique: one row for each rank that a token has experts on, however many; back comes their weighted sum. Which expert
takes which row, and with which gate, travels beside the rows: 8 bytes an assignment.
two_level: unique twice. A token goes once to each node that it has experts on, to the rank that has its sender's place
there; from there once to each rank. The weighted sums are added up in the node before they leave it.

The tokens may be cut into chunks, so that one chunk travels while the experts compute another. Of R ranks that share E
experts a token that draws K of them evenly reaches R (1 - C(E - E/R, K) / C(E, K)).
Legend: T tokens of this rank, t of a chunk, K top_k, A = t*K assignments, E experts, e of a rank, N rows at the experts
of this rank, D hidden_size, P ranks of a group, C chunks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from moe_train.distributed.all_to_all import PendingRows
from moe_train.distributed.collectives import Group, group_size
from moe_train.distributed.observer import UNOBSERVED, CommObserver
from moe_train.model.moe.hop import Held, Hop, HopSizes, Leaving, Leg, arrive_back, destinations
from moe_train.model.moe.manifest import first_destinations, first_table, settle, start_asking
from moe_train.model.moe.steps import Assignments, Routing
from moe_train.ops.host_copy import HostCopy
from moe_train.ops.payload import MODEL_PAYLOAD, Payload
from moe_train.ops.permute import sort_assignments
from moe_train.ops.row_map import RowMap

Path = tuple[Group, ...]
"""Groups in which a token travels to its experts, one after the other: none where all experts are here, one, or two:
across nodes, then within the node. The ranks of the first and their experts are cut into as many ranges."""


@dataclass(frozen=True)
class Plan:
    """What is to happen to a chunk of the tokens.

    Attributes:
        x_tD: Its rows.
        held: Its assignments.
        hops: The hops on their way.
        sizes: What goes where, in every hop.
        is_sent_Pt: Which ranks of the first hop each token goes to, where it goes once to each; else None.
    """

    x_tD: Tensor
    held: Held
    hops: tuple[Hop, ...]
    sizes: tuple[HopSizes, ...]
    is_sent_Pt: Tensor | None


@dataclass(frozen=True)
class Departed:
    """A chunk whose first hop is under way, if there is any."""

    plan: Plan
    leaving: Leaving | None


@dataclass(frozen=True)
class Dispatched:
    """A chunk's rows at their experts, and what `combine` needs to bring them back.

    Attributes:
        rows_ND: Rows that arrived, in the order of the ranks that sent them; without a hop, the tokens' own.
        assignments: What this rank's experts are to do with them.
        legs: Of the hops, the first one first.
    """

    rows_ND: Tensor
    assignments: Assignments
    legs: tuple[Leg, ...] = ()


@dataclass(frozen=True)
class Returning:
    """A chunk whose last way back is under way, if there is any.

    Attributes:
        rows: The outputs, on their way or, without a hop, here.
        leg: Of the first hop.
    """

    rows: PendingRows | Tensor
    leg: Leg | None = None


@dataclass(frozen=True)
class Dispatcher:
    """A way for tokens to reach experts. Every rank of the groups must call all of it, also with rows for nobody.

    Attributes:
        is_unique: Whether a row goes once to each rank (or node), instead of once for each assignment.
        num_chunks: C; the same on all ranks.
        payload: The form in which rows travel.
        observer: Told of the layer's all-to-alls.
    """

    is_unique: bool
    num_chunks: int = 1
    payload: Payload = MODEL_PAYLOAD
    observer: CommObserver = UNOBSERVED

    def plan(self, x_TD: Tensor, routing: Routing, num_experts: int, path: Path) -> tuple[Plan, ...]:
        """Tell the other ranks how many rows to expect, in all chunks.

        Args:
            x_TD: Token rows of this rank.
            routing: The router's decision.
            num_experts: E.
            path: To the experts. Without any group there is one chunk.

        Collective: All ranks of the groups.
        """
        num_chunks = self.num_chunks if path else 1
        orders = [_Order.of(each, num_experts) for each in _split(routing, num_chunks)]
        if not path:
            return (Plan(x_TD, orders[0].hold().executed(orders[0].num_executed()), (), (), None),)
        ranks = [group_size(group) for group in path]
        is_sent = [each.destinations(math.prod(ranks)) if self.is_unique else None for each in orders]
        asking = start_asking(first_table([each.counts_E for each in orders], is_sent, ranks), path[0], self.observer)
        # While the counts travel, and while they are brought to the host:
        held = [each.hold() for each in orders]
        settling = settle(asking, path, self.observer)
        first = [None if each is None else first_destinations(each, ranks[0]) for each in is_sent]
        hops = tuple(Hop(group, self.is_unique, self.observer, self.payload) for group in path)
        rows = x_TD.split(_chunk_sizes(x_TD.shape[0], num_chunks))
        chunks = zip(rows, held, settling.read(), first, strict=True)
        return tuple(Plan(x_tD, own, hops, sizes, to) for x_tD, own, sizes, to in chunks)

    def send(self, plan: Plan) -> Departed:
        """Send a chunk's rows on their first hop. Collective: all ranks of the groups."""
        if not plan.hops:
            return Departed(plan, None)
        return Departed(plan, plan.hops[0].start(plan.x_tD, plan.held, plan.sizes[0], plan.is_sent_Pt))

    def arrive(self, departed: Departed) -> Dispatched:
        """A chunk's rows at their experts.

        Collective: All ranks of the groups, where there are two hops.
        """
        plan, leaving, legs = departed.plan, departed.leaving, []
        rows_ND, held = plan.x_tD, plan.held
        for number, hop in enumerate(plan.hops):
            if leaving is None:
                is_sent_PN = destinations(held.source_S, held.counts_X, rows_ND.shape[0], group_size(hop.group))
                leaving = hop.start(rows_ND, held, plan.sizes[number], is_sent_PN)
            rows_ND, held, leg = hop.arrive(leaving)
            legs.append(leg)
            leaving = None
        assignments = Assignments(held.row_map(rows_ND.shape[0]), held.gates_S, held.counts_X)
        return Dispatched(rows_ND, assignments, tuple(legs))

    def combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Returning:
        """Send the experts' weighted outputs back.

        Args:
            rows_ND: Expert outputs, in the order of dispatched.rows_ND.
            dispatched: From `arrive`.

        Collective: All ranks of the groups.
        """
        if not dispatched.legs:
            return Returning(rows_ND)
        first, *others = dispatched.legs
        for leg in reversed(others):
            rows_ND = arrive_back(leg.hop.start_back(rows_ND, leg), leg)
        return Returning(first.hop.start_back(rows_ND, first), first)

    def finish(self, returning: Returning) -> Tensor:
        """The sum of each token's weighted expert outputs, [t, D]."""
        if isinstance(returning.rows, Tensor):
            return returning.rows
        assert returning.leg is not None
        return arrive_back(returning.rows, returning.leg)


DISPATCHERS: dict[str, Callable[..., Dispatcher]] = {
    "flat": partial(Dispatcher, False),
    "unique": partial(Dispatcher, True),
    "two_level": partial(Dispatcher, True),  # the path makes the difference
}


@dataclass(frozen=True)
class _Order:
    """A chunk's assignments in the order of their experts; behind them those that are not executed.

    Attributes:
        routing: The router's decision.
        order_A: int64, the assignment at every place.
        source_A: int64, its token.
        counts_E: int64, executed assignments of every expert.
    """

    routing: Routing
    order_A: Tensor
    source_A: Tensor
    counts_E: Tensor

    @staticmethod
    def of(routing: Routing, num_experts: int) -> "_Order":
        order_A, counts_E = sort_assignments(routing.experts_TK, num_experts, routing.kept_TK)
        return _Order(routing, order_A, order_A // routing.experts_TK.shape[1], counts_E)

    def destinations(self, num_ranks: int) -> Tensor:
        return destinations(self.source_A, self.counts_E, self.routing.experts_TK.shape[0], num_ranks)

    def hold(self) -> Held:
        gates_A = self.routing.gates_TK.reshape(-1).gather(0, self.order_A)
        copies = self.routing.experts_TK.shape[1]
        known_map = RowMap.of_order(self.order_A, copies) if self.routing.kept_TK is None else None
        return Held(self.source_A, gates_A, self.counts_E, known_map)

    def num_executed(self) -> int:
        if self.routing.kept_TK is None:
            return self.order_A.shape[0]
        # Host synchronisation: the experts need to know how many rows are left.
        [num_executed] = HostCopy([self.counts_E.sum()]).read()
        return int(num_executed)


def _chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Of all chunks; they differ by one at most."""
    return [(number + 1) * num_tokens // num_chunks - number * num_tokens // num_chunks for number in range(num_chunks)]


def _split(routing: Routing, num_chunks: int) -> list[Routing]:
    """The decisions for each chunk of the tokens. Their sums stay those of all tokens."""
    sizes = _chunk_sizes(routing.experts_TK.shape[0], num_chunks)
    kept = [None] * num_chunks if routing.kept_TK is None else routing.kept_TK.split(sizes)
    names = ("gates_TK", "experts_TK", "logits_TE")
    # Not tensor_split: its backward pass makes a tensor of all tokens for each chunk, and adds them.
    parts = zip(*(getattr(routing, name).split(sizes) for name in names), strict=True)
    return [
        replace(routing, **dict(zip(names, part, strict=True)), kept_TK=own)
        for part, own in zip(parts, kept, strict=True)
    ]
