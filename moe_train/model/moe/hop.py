"""One all-to-all on the way of token rows to their experts, and the one that brings back the experts' outputs.

A row that goes to a rank for several assignments goes once for each of them, or once for all: then every assignment
tells which row it is of.
Legend: N rows here, S assignments of theirs, X experts that can be reached from here, P ranks of the group, x = X/P
experts behind each of them, Q rows sent, M rows received, R assignments received, D hidden_size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_train.distributed.all_to_all import PendingRows, Splits, start_rows
from moe_train.distributed.collectives import Group
from moe_train.distributed.observer import CommObserver
from moe_train.ops.payload import Payload
from moe_train.ops.row_map import RowMap, gather_rows, scatter_add_rows


@dataclass(frozen=True)
class Held:
    """Assignments whose rows are on this rank, ordered by their experts, wherever these are.

    Attributes:
        source_S: int64, the row of every assignment. Behind those that counts_X tells of may stand others, for nobody.
        gates_S: fp32 or wider, the factor of every assignment's output.
        counts_X: int64, assignments of every expert.
        known_map: The map of source_S, where it is known without sorting.
    """

    source_S: Tensor
    gates_S: Tensor
    counts_X: Tensor
    known_map: RowMap | None = None

    def executed(self, num_assignments: int) -> "Held":
        """Those that counts_X tells of, alone.

        Args:
            num_assignments: How many these are.
        """
        return replace(self, source_S=self.source_S[:num_assignments], gates_S=self.gates_S[:num_assignments])

    def row_map(self, num_rows: int) -> RowMap:
        """The row of every assignment, of N rows."""
        return self.known_map or RowMap.of(self.source_S, num_rows)


@dataclass(frozen=True)
class HopSizes:
    """What goes where in one hop.

    Attributes:
        rows: Rows.
        assignments: Assignments.
        rows_from_P: int64, rows from each rank: rows.receive, on the device.
        received_Px: int64, assignments from each rank for each expert behind this one.
    """

    rows: Splits
    assignments: Splits
    rows_from_P: Tensor
    received_Px: Tensor


@dataclass(frozen=True)
class Leaving:
    """Rows and assignments that are on their way.

    Attributes:
        rows: The rows.
        gates: The gates of the assignments, [S, 1]; where a row goes once to each rank, [S, 2] with the number of the
            assignment's row among those from its rank.
        sent: The row of every row that was sent.
        sizes: What goes where.
    """

    rows: PendingRows
    gates: PendingRows
    sent: RowMap
    sizes: HopSizes


@dataclass(frozen=True)
class Leg:
    """What the way back needs of a hop.

    Attributes:
        hop: The hop.
        sent: The row of every row that was sent.
        rows: How many went where.
    """

    hop: "Hop"
    sent: RowMap
    rows: Splits


@dataclass(frozen=True)
class Hop:
    """All-to-alls of one group.

    Attributes:
        group: Its ranks; rank i leads to experts i*x .. (i+1)*x - 1.
        is_unique: Whether a row goes once to each rank, instead of once for each assignment.
        observer: Told of the all-to-alls.
        payload: The form in which rows travel.
    """

    group: Group
    is_unique: bool
    observer: CommObserver
    payload: Payload

    def start(self, rows_ND: Tensor, held: Held, sizes: HopSizes, is_sent_PN: Tensor | None) -> Leaving:
        """Send rows and assignments.

        Args:
            rows_ND: Rows of this rank.
            held: Their assignments.
            sizes: What goes where.
            is_sent_PN: From `destinations`, where a row goes once to each rank.

        Collective: All ranks of the group.
        """
        held = held.executed(sum(sizes.assignments.send))
        if is_sent_PN is None:
            sent = held.row_map(rows_ND.shape[0])
        else:
            sent = RowMap.of_table(is_sent_PN, sum(sizes.rows.send))
        rows = start_rows(gather_rows(rows_ND, sent), sizes.rows, self.group, self.observer, self.payload)
        gates = held.gates_S.unsqueeze(1)
        if is_sent_PN is not None:
            # One all-to-all for both: fp32 holds whole numbers up to 2**24, and a rank has fewer tokens.
            places_S = _places_in_blocks(is_sent_PN, held.source_S, held.counts_X)
            gates = torch.cat((gates, places_S.to(gates.dtype).unsqueeze(1)), 1)
        return Leaving(rows, start_rows(gates, sizes.assignments, self.group, self.observer), sent, sizes)

    def arrive(self, leaving: Leaving) -> tuple[Tensor, Held, Leg]:
        """Wait for what the other ranks sent.

        Returns:
            Rows [M, D] in the order of the ranks that sent them; their assignments; what the way back needs.
        """
        sizes = leaving.sizes
        order_R = _order_by_expert(sizes.received_Px, sum(sizes.assignments.receive))
        rows_MD, gates = leaving.rows.wait(), leaving.gates.wait()
        gates_R, counts_x = gates[:, 0].gather(0, order_R), sizes.received_Px.sum(0)
        leg = Leg(self, leaving.sent, sizes.rows)
        if not self.is_unique:
            own_map = RowMap.of_order(order_R, copies=1)
            return rows_MD, Held(order_R, gates_R, counts_x, own_map), leg
        starts_P = sizes.rows_from_P.cumsum(0) - sizes.rows_from_P
        starts_R = starts_P.repeat_interleave(sizes.received_Px.sum(1), output_size=order_R.shape[0])
        source_R = (gates[:, 1].detach().to(torch.int64) + starts_R).gather(0, order_R)
        return rows_MD, Held(source_R, gates_R, counts_x), leg

    def start_back(self, rows_MD: Tensor, leg: Leg) -> PendingRows:
        """Send the outputs of the rows that came, in their order. Collective: all ranks of the group."""
        return start_rows(rows_MD, leg.rows.back, self.group, self.observer, self.payload)


def arrive_back(returning: PendingRows, leg: Leg) -> Tensor:
    """Wait for the outputs, and add up those of each row, in at least fp32. [N, D]."""
    return scatter_add_rows(returning.wait(), leg.sent)


def destinations(source_S: Tensor, counts_X: Tensor, num_rows: int, num_ranks: int) -> Tensor:
    """Which ranks each row has assignments for. bool [P, N].

    Args:
        source_S: int64, the row of every assignment, ordered by expert; those behind the ones that counts_X tells of
            are for nobody.
        counts_X: int64, assignments of every expert.
        num_rows: N.
        num_ranks: P, each of which leads to as many experts.
    """
    rank_S = _ranks(counts_X, num_ranks, source_S.shape[0])
    is_sent = torch.zeros((num_ranks + 1) * num_rows, dtype=torch.bool, device=rank_S.device)
    is_sent.index_fill_(0, rank_S * num_rows + source_S, True)
    return is_sent.view(num_ranks + 1, num_rows)[:num_ranks]


def _ranks(counts_X: Tensor, num_ranks: int, num_assignments: int) -> Tensor:
    """The rank that leads to each assignment's expert; num_ranks for those that are for nobody. int64 [S]."""
    counts_P = counts_X.view(num_ranks, -1).sum(1)  # (X) -> (P)
    ends_P = counts_P.cumsum(0)
    return torch.searchsorted(ends_P, torch.arange(num_assignments, device=ends_P.device), right=True)


def _places_in_blocks(is_sent_PN: Tensor, source_S: Tensor, counts_X: Tensor) -> Tensor:
    """Which of the rows that go to its rank each assignment is of, counted from 0 for every rank. int64 [S]."""
    place_PN = is_sent_PN.cumsum(1) - 1
    return place_PN[_ranks(counts_X, len(is_sent_PN), source_S.shape[0]), source_S]


def _order_by_expert(received_Px: Tensor, num_assignments: int) -> Tensor:
    """Order that groups assignments by expert when they arrived by source rank, then by expert. int64 [R]."""
    experts_Px = torch.arange(received_Px.shape[1], device=received_Px.device).expand_as(received_Px)
    # output_size spares repeat_interleave a host synchronisation.
    expert_of_R = experts_Px.reshape(-1).repeat_interleave(received_Px.reshape(-1), output_size=num_assignments)
    return torch.argsort(expert_of_R, stable=True)
