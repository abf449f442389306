"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), which rotates the two halves of a head as pairs.

Legend: B batch, H heads, S sequence, d head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.ops.kernels import token_kernels_for


def rotary_angles(
    positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine of the rotation angles of every position.

    Args:
        positions_BS: int64 positions; B may be 1 where all rows have the same positions.
        head_dim: d, head size; even.
        theta: Base of the wavelengths.
        dtype: dtype of the result, at least fp32, because bf16 cannot distinguish neighbouring positions.

    Returns:
        cos, sin: [B, 1, S, d/2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_BS.device) / head_dim
    angles = positions_BS[:, None, :, None].double() * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _Rotation(torch.autograd.Function):
    """Rotation by one kernel; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        kernels = token_kernels_for(x_BHSd, cos)
        assert kernels is not None, "`apply_rotary` has asked"
        return kernels.rotate(x_BHSd, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        kernels = token_kernels_for(grads[0])
        assert kernels is not None, "they ran forward"
        return kernels.rotate(grads[0], *ctx.saved_tensors, -1.0), None, None


def apply_rotary(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by the angles of their positions.

    Args:
        x_BHSd: Queries or keys.
        cos: Cosine from `rotary_angles`.
        sin: Sine from `rotary_angles`.

    Returns:
        [B, H, S, d] in the dtype of x, computed in at least fp32.
    """
    if token_kernels_for(x_BHSd, cos):
        return _Rotation.apply(x_BHSd, cos, sin)
    first, second = x_BHSd.to(torch.promote_types(x_BHSd.dtype, torch.float32)).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BHSd.dtype)
