"""Collective operations but all-to-alls, with gradients where the model needs them. A group of None is one process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
