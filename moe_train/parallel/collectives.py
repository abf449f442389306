"""Collective operations, with gradients where the model needs them. A group of None is one process: no communication.

Legend: R rows sent, Q rows received, D hidden_size.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.parallel.position import Direction
from moe_train.parallel.probe import Probe

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
        ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int], group: Group, probe: Probe | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.probe = send, receive, group, probe
        return _exchange_rows(rows_RD, send, receive, group, probe, "forward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_RD = _exchange_rows(grads[0], ctx.receive, ctx.send, ctx.group, ctx.probe, "backward")
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
    probe: Probe | None = None,
) -> Tensor:
    """Send consecutive blocks of rows, block i to rank i of the group; differentiable.

    Args:
        rows_RD: Rows in order of their destination.
        send: Rows for each rank; their sum is R. Zero is allowed.
        receive: Rows from each rank; their sum is Q.
        group: Process group, or None.
        probe: Told of it, in the backward pass too.

    Returns:
        [Q, D], in order of their source.

    Collective: All ranks of the group, also those that send or receive nothing; likewise in the backward pass.
    """
    if group is None:
        return rows_RD
    return _AllToAllRows.apply(rows_RD, list(send), list(receive), group, probe)


def all_to_all_counts(counts: Tensor, group: Group | None, probe: Probe | None = None) -> Tensor:
    """Send row i of counts to rank i; returns what the ranks sent here, in their order.

    Args:
        counts: int64 [ranks, n].
        group: Process group, or None.
        probe: Told of it.

    Collective: All ranks of the group.
    """
    if group is None:
        return counts
    received = torch.empty_like(counts)
    splits = [1] * len(counts)
    to_others = counts.nbytes - counts[0].nbytes
    with _noted(probe, "all_to_all_counts", "forward", splits, splits, to_others):
        dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def all_reduce_sum(x: Tensor, group: Group | None) -> Tensor:
    """The sum over the ranks of the group; differentiable (its adjoint is the same sum of the gradients).

    Collective: All ranks of the group, in the backward pass too.
    """
    return x if group is None else _AllReduceSum.apply(x, group)


def all_reduce_max(x: Tensor, group: Group | None) -> Tensor:
    """The largest of each element over the ranks of the group; without gradient. Collective: all ranks of the group."""
    if group is None:
        return x
    largest = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Every rank's value, in order of rank, on every rank.

    Args:
        value: Picklable.
        group: Of all ranks: the default one, or one of `create_background_group`.

    Collective: All ranks.
    """
    if world_group() is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def is_communication_error(error: BaseException) -> bool:
    """Whether an error is of a collective operation, which is how a rank meets the end of another one."""
    # gloo of torch 2.13 raises plain RuntimeErrors, with the place in its sources.
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore")
    is_plain = type(error) is RuntimeError and any(word in str(error) for word in words)
    return isinstance(error, dist.DistError | ConnectionError) or is_plain


def barrier() -> None:
    """Wait until every rank is here. Collective: all ranks."""
    if world_group() is not None:
        dist.barrier()


def _exchange_rows(
    rows_RD: Tensor, send: list[int], receive: list[int], group: Group, probe: Probe | None, direction: Direction
) -> Tensor:
    received = rows_RD.new_empty((sum(receive), rows_RD.shape[1]))
    to_others = sum(send) - send[group_rank(group)]
    num_bytes = to_others * rows_RD.shape[1] * rows_RD.element_size()
    with _noted(probe, "all_to_all_rows", direction, send, receive, num_bytes):
        dist.all_to_all_single(received, rows_RD.contiguous(), receive, send, group=group)
    return received


def _noted(
    probe: Probe | None,
    operation: str,
    direction: Direction,
    send: Sequence[int],
    receive: Sequence[int],
    num_bytes: int,
) -> contextlib.AbstractContextManager[None]:
    if probe is None:
        return contextlib.nullcontext()
    return probe.around(operation, direction, send, receive, num_bytes)
