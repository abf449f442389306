"""Gradients of ZeRO stages 1 and 2 on a short way into the flat fp32 partition that the optimizer reads.

DeepSpeed (0.19.8) copies a gradient into a bucket, divides it by the number of ranks, copies it back, looks for numbers
that are not finite, converts it to fp64 for the norm, joins the gradients of a group, converts them to fp32, and
multiplies them by the factor of clipping: each is a pass over memory. Here
- a gradient of a group that no other rank holds (experts, mostly) stays where the backward pass left it, undivided;
- one pass copies the gradients of a group into its fp32 partition;
- the norm is computed from there, and is not finite if a gradient is not: there is no other search;
- the number of ranks, fp16's loss scale and clipping are one divisor, which fused AdamW applies while it updates.
The numbers are the same within rounding.
"""

from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn

from moe_train.distributed.collectives import all_reduce_sum, group_size, world_group

_ROW = 4096  # elements whose squares are summed in fp32: so few lose nothing; one sum of millions is off by 5e-4


class DirectGradients:
    """Shorter ways for the gradients of a ZeRO optimizer of stage 1 or 2."""

    def __init__(self, zero: Any) -> None:
        """Replace the functions of the optimizer that move gradients.

        Args:
            zero: DeepSpeed's optimizer, without offload.
        """
        self._zero = zero
        sizes = [group_size(group) for group in zero.real_dp_process_group]
        self._is_own = [size == 1 for size in sizes]
        ranks = float(group_size(zero.dp_process_group))
        self._divisors = [ranks if is_own else 1.0 for is_own in self._is_own]
        self._into_bucket = zero.reduce_independent_p_g_buckets_and_remove_grads
        zero.reduce_independent_p_g_buckets_and_remove_grads = self._reduce
        zero.check_overflow = lambda partition_gradients=True: None  # the norm tells
        zero.scaled_global_norm = self._norm
        zero.unscale_and_clip_grads = self._set_divisor

    def divisor(self, group: int) -> float:
        """Return what the gradients that a parameter group holds have yet to be divided by, besides the loss scale."""
        return self._divisors[group]

    def _reduce(self, parameter: nn.Parameter, group: int) -> None:
        """Reduce the gradient of a micro-batch, or of a step, over the ranks that hold the parameter."""
        if not self._is_own[group] or parameter.numel() == 0:
            self._into_bucket(parameter, group)
        elif self._zero._use_compact_grad_partition_buffer(group):  # it adds up micro-batches in fp32
            place = self._zero.get_param_id(parameter)
            total = self._zero._get_compact_grad_partition_slice(group, 0, place, parameter.numel())
            total.add_(self._zero.get_gradient_for_reduction(parameter).reshape(-1))
            self._zero.clear_grad_attribute(parameter)

    def _norm(self, norm_type: int = 2) -> Tensor:
        """Fill the fp32 partitions, and compute the global norm of the gradients times the loss scale.

        Returns:
            fp32 scalar, the same on all ranks; infinite if a gradient is not finite.

        Collective: All ranks.
        """
        assert norm_type == 2, "DeepSpeed asks for no other"
        squares = torch.zeros((), dtype=torch.float64, device=self._zero.device)
        for group, divisor in enumerate(self._divisors):
            flat = self._fill(group)
            squares += _square_sum(flat) / divisor**2
        norm = all_reduce_sum(squares, world_group()).sqrt().float()
        return torch.where(torch.isfinite(norm), norm, torch.inf)

    def _fill(self, group: int) -> Tensor:
        """Put the gradients of a group into one flat fp32 tensor, unless they are in one. [elements of a partition]."""
        gradients = self._zero.averaged_gradients[group]
        partition = self._zero.single_partition_of_fp32_groups[group]
        filled: Tensor | None = getattr(gradients, "flat_partition", None)
        if filled is not None and filled.dtype == partition.dtype:
            return filled
        flat, parts, start = torch.empty_like(partition.detach()), [], 0
        for gradient in gradients:
            part = flat.narrow(0, start, gradient.numel()).view(gradient.shape)
            parts.append(part.copy_(gradient))
            start += gradient.numel()
        flat[start:] = 0.0
        self._zero.averaged_gradients[group] = GradPartitionBufferGroup(parts, flat)
        return flat

    def _set_divisor(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Divide a group's flat gradients, or let the optimizer do so while it updates.

        Args:
            gradients: The fp32 gradients of one group.
            norm: Result of `_norm`.
        """
        (flat,) = gradients
        partitions = self._zero.single_partition_of_fp32_groups
        group = next(number for number, partition in enumerate(partitions) if partition.grad is flat)
        divisor = torch.full((), self._zero.loss_scale * self._divisors[group], device=flat.device)
        if self._zero.clip_grad > 0.0:
            # 1e-6: as DeepSpeed and torch do, for a norm of 0.
            divisor = divisor * ((norm / self._zero.loss_scale + 1e-6) / self._zero.clip_grad).clamp(min=1.0)
        if self._zero.optimizer.defaults.get("fused"):
            self._zero.optimizer.grad_scale = divisor
        else:
            flat.div_(divisor)


def _square_sum(flat: Tensor) -> Tensor:
    """Sum the squares of a tensor: rows in fp32, their sums in fp64. fp64 scalar."""
    whole = flat.numel() // _ROW * _ROW
    norms = (torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1), torch.linalg.vector_norm(flat[whole:]))
    return norms[0].double().square().sum() + norms[1].double().square()
