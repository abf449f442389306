"""Collective operations except all-to-alls, with gradients where the model needs them. A None group is one process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def group_size(group: Group | None) -> int:
    """Return the number of ranks of the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group | None) -> int:
    """Return this process's rank in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def world_group() -> Group | None:
    """Return the group of all ranks, or None for one process."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Every rank's loss depends on the sum, so its gradient is the sum of all ranks' gradients."""

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


def all_reduce_sum(x: Tensor, group: Group | None) -> Tensor:
    """Sum a tensor over the ranks of the group. Differentiable: the adjoint is the same sum of the gradients.

    Args:
        x: Tensor with the same shape on all ranks.
        group: Process group; None: one process.

    Collective: All ranks of the group, in the backward pass too.
    """
    return x if group is None else _AllReduceSum.apply(x, group)


def all_reduce_max(x: Tensor, group: Group | None) -> Tensor:
    """Take the elementwise maximum over the ranks of the group, without gradient.

    Args:
        x: Tensor with the same shape on all ranks.
        group: Process group; None: one process.

    Collective: All ranks of the group.
    """
    if group is None:
        return x
    largest = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Gather every rank's value on every rank, in rank order.

    Args:
        value: Picklable value of this rank.
        group: Group of all ranks: the default group, or one from `create_background_group`.

    Collective: All ranks.
    """
    if world_group() is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def is_communication_error(error: BaseException) -> bool:
    """Return whether an error comes from a collective operation, as when another rank has ended."""
    # gloo of torch 2.13 raises plain RuntimeErrors, with the position in its source code.
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore")
    is_plain = type(error) is RuntimeError and any(word in str(error) for word in words)
    return isinstance(error, dist.DistError | ConnectionError) or is_plain


def barrier() -> None:
    """Wait until every rank has arrived.

    Collective: All ranks.
    """
    if world_group() is not None:
        dist.barrier()
