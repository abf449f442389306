"""Activation of a SwiGLU. Legend: F intermediate_size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """Autograd function of silu(gate) * up. It keeps only its input, and writes the gradient into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        grad_gate.copy_(torch.ops.aten.silu_backward(grads[0] * up, gate))
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up, where gate and up are the two halves of the last dimension.

    Args:
        gate_up: [..., 2F], any floating dtype.

    Returns:
        [..., F] in the same dtype.
    """
    return _SwiGLU.apply(gate_up)
