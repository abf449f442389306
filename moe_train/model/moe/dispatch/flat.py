"""Flat dispatch, the default: one all-to-all each way, in which a row travels for every executed assignment.

A token that chose K experts is sent K times, each time with the gate of its expert. At the experts' rank the rows are
put in the order of its experts. The experts' outputs, already multiplied by their gates, travel back the same way, and
each token adds up its own.
Legend: T tokens of this rank, t tokens of a chunk, A executed assignments of a chunk, E experts, P ranks, e = E/P
experts of this rank, R rows received, D hidden_size, C chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.distributed.all_to_all import Splits, start_counts, start_rows
from moe_train.distributed.collectives import group_size
from moe_train.model.cost import DispatchSizes, Hop
from moe_train.model.moe.dispatch.base import (
    Dispatched,
    DispatcherKind,
    DispatchSpec,
    assignments_of,
    chunk_sizes,
    split_routing,
)
from moe_train.model.moe.steps import Assignments, Routing
from moe_train.ops.pending import Pending, start_host_copy
from moe_train.ops.permute import sort_keys
from moe_train.ops.row_map import RowMap, gather_rows, scatter_add_rows


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of this rank, and where each of their assignments goes.

    Attributes:
        x_tD: Token rows.
        assignments: Executed assignments, in the order of all experts, and so of their ranks.
        splits: Numbers of rows for and from each rank.
        received_Pe: int64, number of rows from each rank for each expert of this rank.
    """

    x_tD: Tensor
    assignments: Assignments
    splits: Splits
    received_Pe: Tensor


@dataclass(frozen=True)
class FlatDispatcher:
    """A dispatcher that sends the row of every executed assignment to its expert's rank, and its output back."""

    spec: DispatchSpec

    def plan(self, x_TD: Tensor, routing: Routing) -> list[Chunk]:
        (group,), num_chunks = self.spec.groups, self.spec.num_chunks
        assignments = [assignments_of(part) for part in split_routing(routing, num_chunks)]
        counts_CPe = torch.stack([each.counts_e for each in assignments]).view(num_chunks, group_size(group), -1)
        # Rows, and rows per expert, of all chunks in one all-to-all: (C, P, 1+e) -> (P, C*(1+e)).
        sent_CPn = torch.cat((counts_CPe.sum(2, keepdim=True), counts_CPe), 2)
        pending = start_counts(sent_CPn.transpose(0, 1).flatten(1), group, self.spec.observer)
        received_CPn = pending.wait().view(group_size(group), num_chunks, -1).transpose(0, 1)
        # Host synchronisation: all-to-alls need their split sizes as numbers.
        send_CP, receive_CP = start_host_copy([sent_CPn[..., 0], received_CPn[..., 0]]).wait()
        rows = x_TD.split(chunk_sizes(x_TD.shape[0], num_chunks))
        return [
            Chunk(rows[c], assignments[c].first(sum(send)), Splits(tuple(send), tuple(receive)), received_CPn[c, :, 1:])
            for c, (send, receive) in enumerate(zip(send_CP, receive_CP, strict=True))
        ]

    def start(self, chunk: Chunk) -> Pending[Dispatched]:
        (group,), observer = self.spec.groups, self.spec.observer
        rows_AD = gather_rows(chunk.x_tD, chunk.assignments.row_map)
        rows = start_rows(rows_AD, chunk.splits, group, observer, self.spec.payload)
        gates = start_rows(chunk.assignments.gates_R.unsqueeze(1), chunk.splits, group, observer)
        return Pending(lambda: _arrive(chunk, rows, gates))

    def start_combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        chunk, (group,) = dispatched.sent, self.spec.groups
        rows = start_rows(rows_ND, chunk.splits.back, group, self.spec.observer, self.spec.payload)
        return Pending(lambda: scatter_add_rows(rows.wait(), chunk.assignments.row_map))


def _arrive(chunk: Chunk, rows: Pending[Tensor], gates: Pending[Tensor]) -> Dispatched:
    """Wait for a chunk's rows and gates, and put them in the order of this rank's experts."""
    num_received, num_local = sum(chunk.splits.receive), chunk.received_Pe.shape[1]
    experts_Pe = torch.arange(num_local, device=chunk.received_Pe.device).expand_as(chunk.received_Pe)
    # Rows arrive by source rank, then by expert. output_size spares repeat_interleave a host synchronisation.
    expert_R = experts_Pe.reshape(-1).repeat_interleave(chunk.received_Pe.reshape(-1), output_size=num_received)
    order_R = torch.argsort(sort_keys(expert_R, num_local), stable=True)
    rows_RD, gates_R = rows.wait(), gates.wait()[:, 0].gather(0, order_R)
    row_map = RowMap.of_order(order_R, copies=1)
    return Dispatched(rows_RD, Assignments(row_map, gates_R, chunk.received_Pe.sum(0)), chunk)


def _hops(sizes: DispatchSizes) -> tuple[Hop, ...]:
    rows = sizes.assignments / sizes.num_ranks
    return (Hop(sizes.num_ranks, rows, rows * 4, 1 + sizes.num_experts // sizes.num_ranks),)  # gates are fp32


FLAT = DispatcherKind(FlatDispatcher, _hops)
