"""Matrix products of bf16 numbers on a CPU, computed in fp32 where the CPU multiplies fp32 faster.

Only the units for matrices (AMX) and AMD's AVX-512 multiply bf16 faster than fp32. Intel's AVX-512 needs twice the time
(256 x 256 x 1,024 on a Sapphire Rapids whose virtual machine hides AMX, one core: 1.75 ms in bf16, 0.93 ms in fp32),
and a CPU without such instructions more. Either way a product is summed in fp32 and rounded once.
Legend: M rows, I inner size, O size of the output.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPUINFO = Path("/proc/cpuinfo")


def widens(x: Tensor) -> bool:
    """Return whether products with a tensor are computed in fp32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _multiplies_bf16_faster()


def compiles_by_shape(x: Tensor) -> bool:
    """Return whether products with a tensor are computed by oneDNN, which compiles a kernel for each shape."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not widens(x)


def widened(x: Tensor) -> Tensor:
    """Return a tensor in the dtype that products with it are computed in."""
    return x.float() if widens(x) else x


def mm(left_MI: Tensor, right_IO: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply two matrices, without gradient.

    Args:
        left_MI: Left matrix, as it is or `widened`.
        right_IO: Right matrix, as it is or `widened`.
        out: Receives the product, rounded to its dtype; None: nothing does.

    Returns:
        [M, O]; if one of the factors is widened, the product in fp32; else in the dtype of both, rounded once.
    """
    left, right = widened(left_MI), widened(right_IO)
    if out is not None and out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    product = torch.mm(left, right)
    if out is not None:
        out.copy_(product)
    return product if left is left_MI or right is right_IO else product.to(left_MI.dtype)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """Multiply rows by the transpose of a weight.

    Args:
        x: [..., I] rows, in the dtype of the weight.
        weight_OI: Weight.

    Returns:
        [..., O] in the same dtype.
    """
    return _WideLinear.apply(x, weight_OI) if widens(x) else F.linear(x, weight_OI)


class _WideLinear(torch.autograd.Function):
    """Linear map whose products are in fp32. It keeps its 16-bit arguments for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x.float(), weight_OI.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_MO = grads[0].flatten(0, -2).float()  # (..., O) -> (M, O)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MO @ weight_OI.float()).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_MO.t() @ x.flatten(0, -2).float()).to(weight_OI.dtype)
        return grad_x, grad_weight


@functools.cache
def _multiplies_bf16_faster() -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported():
        return True
    return bool(torch.cpu._is_avx512_bf16_supported()) and not _is_intel()


def _is_intel() -> bool:
    return _CPUINFO.exists() and "GenuineIntel" in _CPUINFO.read_text(encoding="utf-8")
