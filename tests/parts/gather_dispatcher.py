"""A dispatcher without an all-to-all: every rank gathers all rows, computes those of its experts, and all add up.

Slow, and short: a reference for the others. Legend: T tokens of this rank, A assignments of all ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.distributed.collectives import Group, group_rank, group_size
from moe_train.model.cost import DispatchSizes, Hop
from moe_train.model.moe.dispatch.base import Dispatched, DispatcherKind, DispatchSpec
from moe_train.model.moe.steps import Assignments, Routing
from moe_train.ops.pending import Pending
from moe_train.ops.row_map import RowMap


class GatherRows(torch.autograd.Function):
    """Rows of all ranks, whose numbers are known; the backward pass adds up what each rank needs of this one's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gathered(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return own_sum(grad, ctx.sizes, ctx.group), None, None


class SumRows(torch.autograd.Function):
    """This rank's part of rows that all ranks have a share of."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return own_sum(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grad, ctx.sizes, ctx.group), None, None


def gathered(rows: Tensor, sizes: list[int], group: Group) -> Tensor:
    padded = torch.nn.functional.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded.contiguous(), group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def own_sum(rows: Tensor, sizes: list[int], group: Group) -> Tensor:
    total = rows.clone()
    dist.all_reduce(total, group=group)
    return total.split(sizes)[group_rank(group)]


@dataclass(frozen=True)
class GatherDispatcher:
    """All-gather and all-reduce in place of all-to-alls; one chunk, whatever the configuration says."""

    spec: DispatchSpec

    def plan(self, x_TD: Tensor, routing: Routing) -> list[Dispatched]:
        (group,) = self.spec.groups
        sizes = [int(size) for size in gathered(torch.tensor([[len(x_TD)]]), [1] * group_size(group), group)]
        rows = GatherRows.apply(x_TD, sizes, group)
        gates_AK = GatherRows.apply(routing.gates_TK, sizes, group)
        kept_TK = torch.ones_like(routing.experts_TK) if routing.kept_TK is None else routing.kept_TK.long()
        experts_AK, kept_AK = (gathered(each, sizes, group) for each in (routing.experts_TK, kept_TK))
        local = routing.num_experts // group_size(group)
        first = local * group_rank(group)
        is_here_A = ((experts_AK >= first) & (experts_AK < first + local) & (kept_AK > 0)).reshape(-1)
        here_N = is_here_A.nonzero()[:, 0]
        expert_N = experts_AK.reshape(-1)[here_N] - first
        order_N = torch.argsort(expert_N, stable=True)
        place_N, counts_E = here_N[order_N], torch.bincount(expert_N, minlength=local)
        row_map = RowMap.of(place_N // experts_AK.shape[1], len(rows))
        assignments = Assignments(row_map, gates_AK.reshape(-1)[place_N], counts_E)
        return [Dispatched(rows, assignments, sizes)]

    def start(self, chunk: Dispatched) -> Pending[Dispatched]:
        return Pending(lambda: chunk)

    def start_combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        (group,) = self.spec.groups
        return Pending(lambda: SumRows.apply(rows_ND, dispatched.sent, group))


def _hops(sizes: DispatchSizes) -> tuple[Hop, ...]:
    return (Hop(sizes.num_ranks, float(sizes.tokens), 4.0 * sizes.tokens * sizes.top_k, 1),)


KIND = DispatcherKind(GatherDispatcher, _hops, merges_rows=True)
