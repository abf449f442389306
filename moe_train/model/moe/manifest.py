"""How many rows and assignments go where, told between the ranks before the first row moves, for all chunks and hops.

A rank tells, for each hop of a token's way, what the next rank will have to expect of it and, where the way goes on,
what that rank will have to send on. So all sizes of all hops are known after one small all-to-all a hop, and are read
on the host at once.
Legend: C chunks, P ranks of a hop's group, E experts, x of them behind each rank of the group, t tokens of a chunk, W
ranks at the ends of all ways, n columns: rows for this hop, rows for each rank of the next hop, assignments of the x
experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.distributed.all_to_all import PendingCounts, Splits, start_counts
from moe_train.distributed.collectives import Group
from moe_train.distributed.observer import CommObserver
from moe_train.model.moe.hop import HopSizes
from moe_train.ops.host_copy import HostCopy


@dataclass(frozen=True)
class Table:
    """What this rank has for the ranks of a hop.

    Attributes:
        counts_CPn: int64.
        num_next: Ranks of the next hop, which have a column each; 0: it is the last.
    """

    counts_CPn: Tensor
    num_next: int

    @property
    def rows_CP(self) -> Tensor:
        """Rows in this hop."""
        return self.counts_CPn[..., 0]

    @property
    def assignments_CPx(self) -> Tensor:
        """Assignments of every expert."""
        return self.counts_CPn[..., 1 + self.num_next :]

    def sent_on(self) -> "Table":
        """What is sent on in the next hop, of a table that came from the ranks of this one."""
        counts_Cn = self.counts_CPn.sum(1)
        rows_CP1 = counts_Cn[:, 1 : 1 + self.num_next].unsqueeze(2)
        assignments_CPx = counts_Cn[:, 1 + self.num_next :].view(len(counts_Cn), self.num_next, -1)
        return Table(torch.cat((rows_CP1, assignments_CPx), 2), 0)


def first_table(counts_E: Sequence[Tensor], is_sent_Wt: Sequence[Tensor | None], ranks: Sequence[int]) -> Table:
    """What this rank has for the ranks of the first hop.

    Args:
        counts_E: int64, assignments of every expert, of each chunk.
        is_sent_Wt: Which ranks at the end of all ways each token of a chunk goes to, where it goes once to each; None:
            once for each assignment.
        ranks: Of the groups, one or two.
    """
    rows = [_rows(*chunk, ranks) for chunk in zip(counts_E, is_sent_Wt, strict=True)]
    columns_CPn = [torch.stack(rows).unsqueeze(2), torch.stack(list(counts_E)).view(len(rows), ranks[0], -1)]
    if len(ranks) == 1:
        return Table(torch.cat(columns_CPn, 2), 0)
    rows_CW = torch.stack([_rows(*chunk, [math.prod(ranks)]) for chunk in zip(counts_E, is_sent_Wt, strict=True)])
    columns_CPn.insert(1, rows_CW.view(len(rows), ranks[0], -1))
    return Table(torch.cat(columns_CPn, 2), ranks[1])


def first_destinations(is_sent_Wt: Tensor, num_ranks: int) -> Tensor:
    """Which ranks of the first hop each token goes to. bool [P, t]."""
    num_ends, num_tokens = is_sent_Wt.shape
    return is_sent_Wt.view(num_ranks, num_ends // num_ranks, num_tokens).any(1)


def _rows(counts_E: Tensor, is_sent_Wt: Tensor | None, ranks: Sequence[int]) -> Tensor:
    """Rows for each rank of the first of some groups. int64 [P]."""
    if is_sent_Wt is None:
        return counts_E.view(ranks[0], -1).sum(1)  # (E) -> (P, x)
    return first_destinations(is_sent_Wt, ranks[0]).sum(1)


@dataclass(frozen=True)
class Asking:
    """The table of a hop on its way to the ranks of its group."""

    own: Table
    on_the_way: PendingCounts

    def wait(self) -> Table:
        """The table of what comes here."""
        num_chunks = len(self.own.counts_CPn)
        arrived = self.on_the_way.wait()  # (P, C*n) -> (C, P, n)
        return Table(arrived.view(len(arrived), num_chunks, -1).transpose(0, 1), self.own.num_next)


def start_asking(table: Table, group: Group, observer: CommObserver) -> Asking:
    """Tell the ranks of a hop. Collective: all ranks of the group."""
    counts_PCn = table.counts_CPn.transpose(0, 1)
    return Asking(table, start_counts(counts_PCn.reshape(len(counts_PCn), -1), group, observer))


@dataclass(frozen=True)
class Settling:
    """The sizes of every chunk in every hop, on their way to the host.

    Attributes:
        came: What comes to this rank in every hop.
        copy: Of the numbers.
    """

    came: tuple[Table, ...]
    copy: HostCopy

    def read(self) -> list[tuple[HopSizes, ...]]:
        """The sizes of every chunk in every hop.

        Host synchronisation: with the count exchange. All-to-alls need their split sizes as numbers.
        """
        read = iter(self.copy.read())
        by_hop = []
        for came in self.came:
            send, send_assignments, receive, receive_assignments = (next(read) for _ in range(4))
            rows, assignments = _splits(send, receive), _splits(send_assignments, receive_assignments)
            by_hop.append(map(HopSizes, rows, assignments, came.rows_CP, came.assignments_CPx))
        return list(zip(*by_hop, strict=True))


def settle(asking: Asking, groups: Sequence[Group], observer: CommObserver) -> Settling:
    """Go on asking in all hops, and start to bring the sizes to the host.

    Args:
        asking: The first hop's table.
        groups: Of the hops, one or two.
        observer: Told of the all-to-alls.

    Collective: All ranks of the groups.
    """
    came = asking.wait()
    hops = [(asking.own, came)]
    if came.num_next:
        asking = start_asking(came.sent_on(), groups[1], observer)
        hops.append((asking.own, asking.wait()))
    numbers = [each for hop in hops for table in hop for each in (table.rows_CP, table.assignments_CPx.sum(2))]
    return Settling(tuple(came for _, came in hops), HostCopy(numbers))


def _splits(send_CP: list[list[int]], receive_CP: list[list[int]]) -> list[Splits]:
    """Of every chunk."""
    return [Splits(tuple(send), tuple(receive)) for send, receive in zip(send_CP, receive_CP, strict=True)]
