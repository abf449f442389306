"""Collective operations, with gradients where the model needs them. A group of None is one process: no communication.

Legend: R rows sent, Q rows received, D hidden_size.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.parallel.traffic import TrafficMeter

Group = dist.ProcessGroup


def group_size(group: Group | None) -> int:
    """Ranks of the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group | None) -> int:
    """This process in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def world_group() -> Group | None:
    """All ranks, or None for one process."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


class _AllToAllRows(torch.autograd.Function):
    """Rows to other ranks; their gradients travel the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int], group: Group, meter: TrafficMeter | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.meter = send, receive, group, meter
        return _exchange_rows(rows_RD, send, receive, group, meter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_RD = _exchange_rows(grads[0], ctx.receive, ctx.send, ctx.group, ctx.meter)
        return grad_RD, None, None, None, None


class _AllReduceSum(torch.autograd.Function):
    """The sum over ranks; every rank's loss depends on it, so the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def all_to_all_rows(
    rows_RD: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group | None,
    meter: TrafficMeter | None = None,
) -> Tensor:
    """Send consecutive blocks of rows, block i to rank i of the group; differentiable.

    Args:
        rows_RD: Rows in order of their destination.
        send: Rows for each rank; their sum is R. Zero is allowed.
        receive: Rows from each rank; their sum is Q.
        group: Process group, or None.
        meter: Told what it costs, in the backward pass too.

    Returns:
        [Q, D], in order of their source.

    Collective: All ranks of the group, also those that send or receive nothing; likewise in the backward pass.
    """
    if group is None:
        return rows_RD
    return _AllToAllRows.apply(rows_RD, list(send), list(receive), group, meter)


def all_to_all_counts(counts: Tensor, group: Group | None, meter: TrafficMeter | None = None) -> Tensor:
    """Send row i of counts to rank i; returns what the ranks sent here, in their order.

    Args:
        counts: int64 [ranks, n].
        group: Process group, or None.
        meter: Told what it costs.

    Collective: All ranks of the group.
    """
    if group is None:
        return counts
    received = torch.empty_like(counts)
    with _measured(meter, counts.nbytes - counts[0].nbytes):
        dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def all_reduce_sum(x: Tensor, group: Group | None) -> Tensor:
    """The sum over the ranks of the group; differentiable (its adjoint is the same sum of the gradients).

    Collective: All ranks of the group, in the backward pass too.
    """
    return x if group is None else _AllReduceSum.apply(x, group)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on every rank. Collective: all ranks."""
    if world_group() is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here. Collective: all ranks."""
    if world_group() is not None:
        dist.barrier()


def _exchange_rows(
    rows_RD: Tensor, send: list[int], receive: list[int], group: Group, meter: TrafficMeter | None
) -> Tensor:
    received = rows_RD.new_empty((sum(receive), rows_RD.shape[1]))
    to_others = sum(send) - send[group_rank(group)]
    with _measured(meter, to_others * rows_RD.shape[1] * rows_RD.element_size()):
        dist.all_to_all_single(received, rows_RD.contiguous(), receive, send, group=group)
    return received


def _measured(meter: TrafficMeter | None, num_bytes: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if meter is None else meter.measure(num_bytes)
