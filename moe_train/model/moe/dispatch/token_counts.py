"""Exchange of the numbers of rows and assignments before the first row moves, for all chunks and stages at once.

For each stage of a token's way, a rank tells the next rank what to expect from it and, if the way goes on, what to send
on. So all sizes of all stages are known after one small all-to-all per stage, and the host reads them at once.
Legend: C chunks, P ranks of a stage's group, E experts, x experts behind each rank of the group, t tokens of a chunk, W
ranks at the ends of all ways, n columns: rows for this stage, rows for each rank of the next stage, assignments of the
x experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.distributed.all_to_all import Splits, start_counts
from moe_train.distributed.collectives import Group
from moe_train.distributed.observer import CommObserver
from moe_train.ops.pending import Pending, start_host_copy


@dataclass(frozen=True)
class StageSizes:
    """Numbers of rows and assignments in one stage of a chunk's way.

    Attributes:
        rows: Numbers of rows for and from each rank.
        assignments: Numbers of assignments for and from each rank.
        rows_from_P: int64, number of rows from each rank: rows.receive, on the device.
        received_Px: int64, number of assignments from each rank for each expert behind this rank.
    """

    rows: Splits
    assignments: Splits
    rows_from_P: Tensor
    received_Px: Tensor


@dataclass(frozen=True)
class CountTable:
    """Numbers of rows and assignments that one side has for the ranks of a stage.

    Attributes:
        counts_CPn: int64, with the columns of the legend.
        num_next: Number of ranks of the next stage, which have a column each; 0: this is the last stage.
    """

    counts_CPn: Tensor
    num_next: int

    @property
    def rows_CP(self) -> Tensor:
        """Numbers of rows in this stage."""
        return self.counts_CPn[..., 0]

    @property
    def assignments_CPx(self) -> Tensor:
        """Numbers of assignments of every expert."""
        return self.counts_CPn[..., 1 + self.num_next :]

    def sent_on(self) -> "CountTable":
        """Make the table of the next stage from a table that came from the ranks of this stage."""
        counts_Cn = self.counts_CPn.sum(1)
        rows_CP1 = counts_Cn[:, 1 : 1 + self.num_next].unsqueeze(2)
        assignments_CPx = counts_Cn[:, 1 + self.num_next :].view(len(counts_Cn), self.num_next, -1)
        return CountTable(torch.cat((rows_CP1, assignments_CPx), 2), 0)


def first_table(counts_E: Sequence[Tensor], is_sent_Wt: Sequence[Tensor], ranks: Sequence[int]) -> CountTable:
    """Make the table of what this rank has for the ranks of the first stage.

    Args:
        counts_E: int64, assignments per expert, for each chunk.
        is_sent_Wt: bool, the ranks at the ends of all ways that each token goes to, for each chunk.
        ranks: Number of ranks of each stage's group, for one or two stages.
    """
    rows_CP = torch.stack([first_destinations(is_sent, ranks[0]).sum(1) for is_sent in is_sent_Wt])
    columns_CPn = [rows_CP.unsqueeze(2), torch.stack(list(counts_E)).view(*rows_CP.shape, -1)]
    if len(ranks) == 1:
        return CountTable(torch.cat(columns_CPn, 2), 0)
    rows_CW = torch.stack([first_destinations(is_sent, math.prod(ranks)).sum(1) for is_sent in is_sent_Wt])
    columns_CPn.insert(1, rows_CW.view(*rows_CP.shape, -1))
    return CountTable(torch.cat(columns_CPn, 2), ranks[1])


def first_destinations(is_sent_Wt: Tensor, num_ranks: int) -> Tensor:
    """Mark the ranks of the first stage that each token goes to. bool [P, t]."""
    num_ends, num_tokens = is_sent_Wt.shape
    return is_sent_Wt.view(num_ranks, num_ends // num_ranks, num_tokens).any(1)


def start_table(table: CountTable, group: Group, observer: CommObserver) -> Pending[CountTable]:
    """Send a table to the ranks of its stage, from whom the table of what comes here arrives.

    Collective: All ranks of the group.
    """
    counts_PCn = table.counts_CPn.transpose(0, 1)
    counts = start_counts(counts_PCn.reshape(len(counts_PCn), -1), group, observer)

    def finish() -> CountTable:
        arrived = counts.wait()  # (P, C*n) -> (C, P, n)
        return CountTable(arrived.view(len(arrived), counts_PCn.shape[1], -1).transpose(0, 1), table.num_next)

    return Pending(finish)


def exchange_sizes(
    table: CountTable, groups: Sequence[Group], observer: CommObserver
) -> Pending[list[tuple[StageSizes, ...]]]:
    """Exchange the tables of all stages, and start to copy the sizes to the host.

    Args:
        table: What this rank has for the ranks of the first stage.
        groups: Groups of the stages, one or two.
        observer: Observer of the all-to-alls.

    Returns:
        Pending sizes of every chunk in every stage. Host synchronisation: `wait` waits for the exchange, because
        all-to-alls need split sizes as numbers.

    Collective: All ranks of the groups.
    """
    stages = [(table, start_table(table, groups[0], observer).wait())]
    if table.num_next:
        onward = stages[0][1].sent_on()
        stages.append((onward, start_table(onward, groups[1], observer).wait()))
    numbers = [each for stage in stages for side in stage for each in (side.rows_CP, side.assignments_CPx.sum(2))]
    copy = start_host_copy(numbers)

    def finish() -> list[tuple[StageSizes, ...]]:
        read = iter(copy.wait())
        by_stage = []
        for _, came in stages:
            send, send_assignments, receive, receive_assignments = (next(read) for _ in range(4))
            rows, assignments = _splits(send, receive), _splits(send_assignments, receive_assignments)
            by_stage.append(map(StageSizes, rows, assignments, came.rows_CP, came.assignments_CPx))
        return list(zip(*by_stage, strict=True))

    return Pending(finish)


def _splits(send_CP: list[list[int]], receive_CP: list[list[int]]) -> list[Splits]:
    """Make the splits of every chunk."""
    return [Splits(tuple(send), tuple(receive)) for send, receive in zip(send_CP, receive_CP, strict=True)]
