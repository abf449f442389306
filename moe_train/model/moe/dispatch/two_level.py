"""Two-level dispatch: one row for each node that a token has experts on, and from there one row for each rank.

A row goes to the rank of the other node that has the sender's place there, and is sent on within that node. The
weighted sums are added up in the node before they leave it.
Legend: M rows received, t tokens of a chunk, D hidden_size.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_train.distributed.collectives import group_size
from moe_train.model.cost import DispatchSizes, Hop
from moe_train.model.moe.dispatch.base import Dispatched, Dispatcher, DispatcherKind, DispatchSpec
from moe_train.model.moe.dispatch.unique import (
    ROUTING_BYTES,
    Chunk,
    Stage,
    UniqueDispatcher,
    destinations,
    hops,
    plan_stages,
)
from moe_train.model.moe.steps import Routing
from moe_train.ops.pending import Pending


@dataclass(frozen=True)
class TwoLevelDispatcher:
    """A dispatcher that works like `unique` twice: across nodes, then within the node."""

    spec: DispatchSpec

    def plan(self, x_TD: Tensor, routing: Routing) -> list[Chunk]:
        return plan_stages(x_TD, routing, self.spec)

    def start(self, chunk: Chunk) -> Pending[Dispatched]:
        across = self._across.start(chunk.x_tD, chunk.assignments, chunk.sizes[0], chunk.is_sent_Pt)
        return Pending(lambda: self._send_on(chunk, across.wait()))

    def _send_on(self, chunk: Chunk, came: Dispatched) -> Dispatched:
        """Send the other nodes' rows on within this node, and wait for those of this node's ranks.

        Collective: All ranks of the node.
        """
        is_sent_PM = destinations(came.assignments, group_size(self._within.group))
        here = self._within.start(came.rows_ND, came.assignments, chunk.sizes[1], is_sent_PM).wait()
        return Dispatched(here.rows_ND, here.assignments, (came.sent, here.sent))

    def start_combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        across, within = dispatched.sent
        return self._across.start_back(self._within.start_back(rows_ND, within).wait(), across)

    @property
    def _across(self) -> Stage:
        return Stage(self.spec.groups[0], self.spec)

    @property
    def _within(self) -> Stage:
        return Stage(self.spec.groups[1], self.spec)


def _build(spec: DispatchSpec) -> Dispatcher:
    """Make the dispatcher; if the ranks that share the experts are all on one node, it has one stage."""
    return TwoLevelDispatcher(spec) if len(spec.groups) > 1 else UniqueDispatcher(spec)


def _hops(sizes: DispatchSizes) -> tuple[Hop, ...]:
    inside = sizes.node_size
    if inside is None:
        return hops(sizes)
    nodes, behind = sizes.num_ranks // inside, sizes.num_experts // sizes.num_ranks
    to_node = sizes.tokens * sizes.share_reached(sizes.num_experts // nodes)
    to_rank = sizes.tokens * nodes * sizes.share_reached(behind)
    return (
        Hop(nodes, to_node, sizes.assignments / nodes * ROUTING_BYTES, 1 + inside + sizes.num_experts // nodes),
        Hop(inside, to_rank, sizes.assignments / inside * ROUTING_BYTES, 1 + behind),
    )


TWO_LEVEL = DispatcherKind(_build, _hops, merges_rows=True, leaves_nodes_once=True)
