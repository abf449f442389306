"""Normalisation over the last dimension, with at least fp32 accumulation. Legend: D size of the last dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute RMSNorm: x / sqrt(mean(x^2) + epsilon) * weight.

    Args:
        x: [..., D], any floating dtype.
        weight: Gain, [D].
        epsilon: Added to the mean square.

    Returns:
        [..., D] in the dtype of x.

    Source: Zhang and Sennrich 2019.
    """
    if x.is_cuda:  # one kernel, whose arithmetic is fp32 whatever the dtype: no copies
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), epsilon).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Compute LayerNorm: (x - mean) / sqrt(biased variance + epsilon) * weight + bias.

    Args:
        x: [..., D], any floating dtype.
        weight: Gain, [D].
        bias: Bias, [D].
        epsilon: Added to the variance.

    Returns:
        [..., D] in the dtype of x.
    """
    if x.is_cuda:  # as above
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), epsilon)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), epsilon).to(x.dtype)
