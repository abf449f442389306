"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), first half of a head against the second.

Legend: B batch, H heads, S sequence, d head size.
"""

import torch
from torch import Tensor


def rotary_angles(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    Args:
        positions_BS: int64 positions; B may be 1 where all rows have the same.
        head_dim: d, even.
        theta: Base of the wave lengths.

    Returns:
        cos, sin: fp32 [B, 1, S, d/2]. fp32 because bf16 cannot tell neighbouring positions apart.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_BS.device) / head_dim
    angles = positions_BS[:, None, :, None].double() * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their positions' angles.

    Args:
        x_BHSd: Queries or keys.
        cos: From `rotary_angles`.
        sin: From `rotary_angles`.

    Returns:
        [B, H, S, d] of x's dtype, computed in at least fp32.
    """
    first, second = x_BHSd.to(torch.promote_types(x_BHSd.dtype, torch.float32)).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BHSd.dtype)
