"""Unique dispatch: one row for each rank that a token has experts on, however many; their weighted sum comes back.

The expert and gate of every row travel beside the rows, with 8 bytes per assignment. A token that draws K of E experts
evenly reaches P (1 - C(E - E/P, K) / C(E, K)) of the P ranks that share them.
Legend: T tokens of this rank, t of a chunk, N rows here, S assignments of theirs, X experts that can be reached from
here, P ranks of the group, x = X/P experts behind each of them, Q rows sent, M rows received, R assignments received,
D hidden_size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.distributed.all_to_all import Splits, start_rows
from moe_train.distributed.collectives import Group, group_size
from moe_train.model.cost import DispatchSizes, Hop
from moe_train.model.moe.dispatch.base import (
    Dispatched,
    DispatcherKind,
    DispatchSpec,
    assignments_of,
    chunk_sizes,
    split_routing,
)
from moe_train.model.moe.dispatch.token_counts import (
    StageSizes,
    exchange_sizes,
    first_destinations,
    first_table,
)
from moe_train.model.moe.steps import Assignments, Routing
from moe_train.ops.pending import Pending
from moe_train.ops.permute import sort_keys
from moe_train.ops.row_map import RowMap, gather_rows, scatter_add_rows


@dataclass(frozen=True)
class SentRows:
    """Rows that a stage has sent, as the way back needs them.

    Attributes:
        row_map: Map from every row that was sent to its row on this rank.
        splits: Numbers of rows for and from each rank.
    """

    row_map: RowMap
    splits: Splits


@dataclass(frozen=True)
class Stage:
    """All-to-alls of one group, in which a row goes once to each rank that it has assignments for.

    Attributes:
        group: Group of the stage; rank i leads to experts i*x .. (i+1)*x - 1.
        spec: Settings of the dispatcher: payload and observer.
    """

    group: Group
    spec: DispatchSpec

    def start(
        self, rows_ND: Tensor, assignments: Assignments, sizes: StageSizes, is_sent_PN: Tensor
    ) -> Pending[Dispatched]:
        """Send rows and assignments.

        Args:
            rows_ND: Rows of this rank.
            assignments: Assignments of the rows; after those that are executed, there may be others.
            sizes: Numbers of rows and assignments for and from each rank.
            is_sent_PN: Table from `destinations`.

        Returns:
            Pending rows in the order of the ranks that sent them, with their assignments in the order of experts.

        Collective: All ranks of the group.
        """
        executed = assignments.first(sum(sizes.assignments.send))
        row_map, observer = RowMap.of_table(is_sent_PN, sum(sizes.rows.send)), self.spec.observer
        rows = start_rows(gather_rows(rows_ND, row_map), sizes.rows, self.group, observer, self.spec.payload)
        # One all-to-all for both: fp32 holds whole numbers up to 2**24, and a rank has fewer tokens.
        places_S = _places_in_blocks(is_sent_PN, executed)
        gates = torch.stack((executed.gates_R, places_S.to(executed.gates_R.dtype)), 1)
        pending = start_rows(gates, sizes.assignments, self.group, observer)
        return Pending(lambda: _arrive(rows, pending, sizes, SentRows(row_map, sizes.rows)))

    def start_back(self, rows_MD: Tensor, sent: SentRows) -> Pending[Tensor]:
        """Send the outputs of the rows that came, in their order; each row's own are added up, in at least fp32.

        Collective: All ranks of the group.
        """
        rows = start_rows(rows_MD, sent.splits.back, self.group, self.spec.observer, self.spec.payload)
        return Pending(lambda: scatter_add_rows(rows.wait(), sent.row_map))


def _arrive(rows: Pending[Tensor], gates: Pending[Tensor], sizes: StageSizes, sent: SentRows) -> Dispatched:
    """Wait for a stage's rows, and for their assignments' gates and row numbers [S, 2]."""
    order_R = _order_by_expert(sizes.received_Px, sum(sizes.assignments.receive))
    rows_MD, gates_S2 = rows.wait(), gates.wait()
    starts_P = sizes.rows_from_P.cumsum(0) - sizes.rows_from_P
    starts_R = starts_P.repeat_interleave(sizes.received_Px.sum(1), output_size=order_R.shape[0])
    source_R = (gates_S2[:, 1].detach().to(torch.int64) + starts_R).gather(0, order_R)
    row_map = RowMap.of(source_R, rows_MD.shape[0])
    return Dispatched(rows_MD, Assignments(row_map, gates_S2[:, 0].gather(0, order_R), sizes.received_Px.sum(0)), sent)


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of this rank, and where they go.

    Attributes:
        x_tD: Token rows.
        assignments: Assignments of the tokens, in the order of all experts.
        sizes: Numbers of rows and assignments, in every stage.
        is_sent_Pt: bool, the ranks of the first stage that each token goes to.
    """

    x_tD: Tensor
    assignments: Assignments
    sizes: tuple[StageSizes, ...]
    is_sent_Pt: Tensor


def plan_stages(x_TD: Tensor, routing: Routing, spec: DispatchSpec) -> list[Chunk]:
    """Exchange the sizes of all chunks in all stages.

    Args:
        x_TD: Token rows of this rank.
        routing: Decision of the router.
        spec: Settings of the dispatcher: groups of the stages, chunks and observer.

    Collective: All ranks of the groups.
    """
    ranks = [group_size(group) for group in spec.groups]
    assignments = [assignments_of(part) for part in split_routing(routing, spec.num_chunks)]
    is_sent = [destinations(each, math.prod(ranks)) for each in assignments]
    table = first_table([each.counts_e for each in assignments], is_sent, ranks)
    pending = exchange_sizes(table, spec.groups, spec.observer)
    first = [first_destinations(each, ranks[0]) for each in is_sent]  # while the sizes are brought to the host
    rows = x_TD.split(chunk_sizes(x_TD.shape[0], spec.num_chunks))
    return [Chunk(*chunk) for chunk in zip(rows, assignments, pending.wait(), first, strict=True)]


@dataclass(frozen=True)
class UniqueDispatcher:
    """A dispatcher that sends a token's row once to each rank that it has experts on, and their weighted sum back."""

    spec: DispatchSpec

    def plan(self, x_TD: Tensor, routing: Routing) -> list[Chunk]:
        return plan_stages(x_TD, routing, self.spec)

    def start(self, chunk: Chunk) -> Pending[Dispatched]:
        return self._stage.start(chunk.x_tD, chunk.assignments, chunk.sizes[0], chunk.is_sent_Pt)

    def start_combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        return self._stage.start_back(rows_ND, dispatched.sent)

    @property
    def _stage(self) -> Stage:
        return Stage(self.spec.groups[0], self.spec)


def destinations(assignments: Assignments, num_ranks: int) -> Tensor:
    """Mark the ranks that each row has assignments for. bool [P, N].

    Args:
        assignments: Assignments in the order of experts; those after the counted ones are for no rank.
        num_ranks: P, number of ranks, each of which leads to the same number of experts.
    """
    num_rows, source_S = assignments.row_map.num_sources, assignments.row_map.source_R
    rank_S = _ranks(assignments, num_ranks)
    is_sent = torch.zeros((num_ranks + 1) * num_rows, dtype=torch.bool, device=rank_S.device)
    is_sent.index_fill_(0, rank_S * num_rows + source_S, True)
    return is_sent.view(num_ranks + 1, num_rows)[:num_ranks]


def _ranks(assignments: Assignments, num_ranks: int) -> Tensor:
    """Find the rank that leads to each assignment's expert; num_ranks for those that are for no rank. int64 [S]."""
    ends_P = assignments.counts_e.view(num_ranks, -1).sum(1).cumsum(0)  # (X) -> (P)
    places_S = torch.arange(assignments.num_assignments, device=ends_P.device)
    return torch.searchsorted(ends_P, places_S, right=True)


def _places_in_blocks(is_sent_PN: Tensor, assignments: Assignments) -> Tensor:
    """Find the place of each assignment's row among the rows that go to the same rank, from 0. int64 [S]."""
    place_PN = is_sent_PN.cumsum(1) - 1
    return place_PN[_ranks(assignments, len(is_sent_PN)), assignments.row_map.source_R]


def _order_by_expert(received_Px: Tensor, num_assignments: int) -> Tensor:
    """Order assignments by expert, which arrived by source rank, then by expert. int64 [R]."""
    experts_Px = torch.arange(received_Px.shape[1], device=received_Px.device).expand_as(received_Px)
    # output_size spares repeat_interleave a host synchronisation.
    expert_R = experts_Px.reshape(-1).repeat_interleave(received_Px.reshape(-1), output_size=num_assignments)
    return torch.argsort(sort_keys(expert_R, received_Px.shape[1]), stable=True)


ROUTING_BYTES = 8  # of an assignment: its gate, fp32, and its token's place, int32


def hops(sizes: DispatchSizes) -> tuple[Hop, ...]:
    """Describe what is sent, in one hop."""
    behind = sizes.num_experts // sizes.num_ranks
    rows = sizes.tokens * sizes.share_reached(behind)
    return (Hop(sizes.num_ranks, rows, sizes.assignments / sizes.num_ranks * ROUTING_BYTES, 1 + behind),)


UNIQUE = DispatcherKind(UniqueDispatcher, hops, merges_rows=True)
