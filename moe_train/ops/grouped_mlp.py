"""SwiGLU of many experts at once over rows grouped by expert.

Legend: R rows, D hidden_size, F intermediate_size, e experts of this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only its input; the gradient is written into one tensor, not into two halves."""

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
    """silu(gate) * up, the two halves of the last dimension. [..., 2F] -> [..., F]."""
    return _SwiGLU.apply(gate_up)


def grouped_swiglu(rows_RD: Tensor, gate_up_eDG: Tensor, down_eFD: Tensor, counts_e: Tensor) -> Tensor:
    """Expert i's SwiGLU, w_down(silu(x w_gate) * (x w_up)), of its rows.

    Args:
        rows_RD: Rows grouped by expert, in order.
        gate_up_eDG: [e, D, 2F], w_gate then w_up.
        down_eFD: [e, F, D].
        counts_e: int64, rows an expert; zero is allowed.

    Returns:
        [R, D] of the rows' dtype.
    """
    offsets_e = counts_e.cumsum(0).to(torch.int32)
    hidden_RF = swiglu(grouped_matmul(rows_RD, gate_up_eDG, offsets_e))
    return grouped_matmul(hidden_RF, down_eFD, offsets_e)


def grouped_matmul(rows_RM: Tensor, weight_eMN: Tensor, offsets_e: Tensor) -> Tensor:
    """rows[offsets[i-1]:offsets[i]] @ weight[i] for every i.

    Args:
        rows_RM: Rows grouped by expert.
        weight_eMN: One matrix an expert, of the rows' dtype.
        offsets_e: int32, the end of each expert's rows; the last is R.

    Returns:
        [R, N].
    """
    if _has_grouped_mm(rows_RM, weight_eMN):
        return F.grouped_mm(rows_RM, weight_eMN, offs=offsets_e)
    return grouped_matmul_loop(rows_RM, weight_eMN, offsets_e)


def grouped_matmul_loop(rows_RM: Tensor, weight_eMN: Tensor, offsets_e: Tensor) -> Tensor:
    """`grouped_matmul` one expert after the other: any dtype, at the price of reading the offsets on the host."""
    ends = offsets_e.tolist()  # host synchronisation: slices need numbers
    starts = [0, *ends[:-1]]
    parts = [rows_RM[a:b] @ weight for a, b, weight in zip(starts, ends, weight_eMN.unbind(0), strict=True)]
    return torch.cat(parts)


def _has_grouped_mm(rows_RM: Tensor, weight_eMN: Tensor) -> bool:
    # torch 2.13 refuses fp64, and rows that are no multiple of 16 bytes; F.grouped_mm is public since 2.10.
    if not hasattr(F, "grouped_mm") or rows_RM.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * rows_RM.element_size() % 16 == 0 for width in weight_eMN.shape[1:])
