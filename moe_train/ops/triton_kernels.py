"""Triton kernels for rows that are routed to experts: gather, sum by source, gated SwiGLU and its gradients.

moe_train.ops.kernels decides where they run. moe_train.ops.row_map and routed_mlp compute the same in PyTorch.
Arithmetic is fp32, and each result is rounded once. Results do not depend on timing: there are no atomic additions, and
the block size depends on the width alone.
Legend: N source rows, R places, D width of a row, F intermediate_size, G = 2F. A program of a kernel computes one row,
or a block of its columns. A stride is the distance between two rows, in elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Most columns that a program computes at a time; fewer for the gradients, which keep several fp32 values per column.
_MAX_BLOCK = 2048
_MAX_GRADIENT_BLOCK = 1024
_COLUMNS_A_WARP = 512  # 16 per thread: two loads of 16 bytes in flight for bf16


def gather_rows(rows_ND: Tensor, source_R: Tensor) -> Tensor:
    """Copy to every place the row of its source.

    Args:
        rows_ND: Rows of the sources, fp32, bf16 or fp16.
        source_R: int64, the source of every place.

    Returns:
        [R, D] in the dtype of the rows.
    """
    rows_ND, source_R = _with_dense_rows(rows_ND), source_R.contiguous()
    out_RD = rows_ND.new_empty(source_R.shape[0], rows_ND.shape[1])
    if out_RD.numel():
        block, warps = _block(out_RD.shape[1], _MAX_BLOCK)
        with torch.cuda.device_of(out_RD):  # Triton launches on the current device
            _gather_kernel[_grid(out_RD, block)](
                rows_ND, source_R, out_RD, out_RD.shape[1], rows_ND.stride(0), BLOCK=block, num_warps=warps
            )
    return out_RD


def sum_rows(rows_RD: Tensor, places_R: Tensor, offsets_N: Tensor) -> Tensor:
    """Sum the places of each source, in their order.

    Args:
        rows_RD: Rows of the places, fp32, bf16 or fp16.
        places_R: int64, the places ordered by their source.
        offsets_N: int64, the start of each source's places in `places_R`.

    Returns:
        [N, D] in the dtype of the rows; zero for a source without a place.
    """
    rows_RD, places_R, offsets_N = _with_dense_rows(rows_RD), places_R.contiguous(), offsets_N.contiguous()
    num_sources, num_places = offsets_N.shape[0], places_R.shape[0]
    out_ND = rows_RD.new_empty(num_sources, rows_RD.shape[1])
    if out_ND.numel():
        block, warps = _block(out_ND.shape[1], _MAX_BLOCK)
        tensors = (rows_RD, places_R, offsets_N, out_ND)
        with torch.cuda.device_of(out_ND):
            _sum_kernel[_grid(out_ND, block)](
                *tensors, num_sources, num_places, out_ND.shape[1], rows_RD.stride(0), BLOCK=block, num_warps=warps
            )
    return out_ND


def gated_swiglu(hidden_RG: Tensor, gates_R: Tensor) -> Tensor:
    """Compute silu(gate half) * up half * gate of the row.

    Args:
        hidden_RG: fp32, bf16 or fp16: the gate half, then the up half.
        gates_R: fp32, the gate of every row.

    Returns:
        [R, F] in the dtype of hidden_RG.
    """
    hidden_RG, gates_R = _with_dense_rows(hidden_RG), gates_R.contiguous()
    out_RF = hidden_RG.new_empty(hidden_RG.shape[0], hidden_RG.shape[1] // 2)
    if out_RF.numel():
        block, warps = _block(out_RF.shape[1], _MAX_BLOCK)
        with torch.cuda.device_of(out_RF):
            _swiglu_kernel[_grid(out_RF, block)](
                hidden_RG, gates_R, out_RF, out_RF.shape[1], hidden_RG.stride(0), BLOCK=block, num_warps=warps
            )
    return out_RF


def gated_swiglu_gradients(hidden_RG: Tensor, slope_RF: Tensor, gates_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute `gated_swiglu`, and compute its gradients with respect to hidden_RG and the gates.

    Args:
        hidden_RG: fp32, bf16 or fp16: the gate half, then the up half.
        slope_RF: Gradient with respect to the activation times the gate, in the dtype of hidden_RG.
        gates_R: fp32, the gate of every row.

    Returns:
        Gradient of hidden [R, 2F], the result of `gated_swiglu` [R, F], and the gradient of the gates [R].
    """
    hidden_RG, slope_RF, gates_R = _with_dense_rows(hidden_RG), _with_dense_rows(slope_RF), gates_R.contiguous()
    num_rows, width = slope_RF.shape
    grad_hidden_RG = hidden_RG.new_empty(num_rows, 2 * width)
    active_RF = hidden_RG.new_empty(num_rows, width)
    grad_gates_R = torch.empty_like(gates_R)
    if num_rows:
        block, warps = _block(width, _MAX_GRADIENT_BLOCK)
        tensors = (hidden_RG, slope_RF, gates_R, grad_hidden_RG, active_RF, grad_gates_R)
        with torch.cuda.device_of(hidden_RG):
            _swiglu_gradients_kernel[(num_rows,)](
                *tensors, width, hidden_RG.stride(0), slope_RF.stride(0), BLOCK=block, num_warps=warps
            )
    return grad_hidden_RG, active_RF, grad_gates_R


def _block(width: int, largest: int) -> tuple[int, int]:
    """Choose the columns that a program computes at a time, a power of two as Triton requires, and its warps."""
    block = min(triton.next_power_of_2(max(width, 1)), largest)
    return block, max(block // _COLUMNS_A_WARP, 1)


def _grid(out_RM: Tensor, block: int) -> tuple[int, int]:
    return out_RM.shape[0], triton.cdiv(out_RM.shape[1], block)


def _with_dense_rows(rows_RM: Tensor) -> Tensor:
    """Make the elements of each row contiguous; the gradient of a sum, an expanded tensor, has others."""
    return rows_RM if rows_RM.stride(1) == 1 else rows_RM.contiguous()


# Kernels. Row numbers are int64, because row number x stride can exceed 2^31. Each program has only one row: with
# blocks of several rows, Triton 3.7 did not compile the weighted sum.


@triton.jit
def _gather_kernel(rows, sources, out, width, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(rows + tl.load(sources + place) * stride + column, mask=column < width)
    tl.store(out + place * width + column, value, mask=column < width)


# The numbers differ from step to step; specialised on them, the kernel would be compiled again and again.
@triton.jit(do_not_specialize=["num_sources", "num_places"])
def _sum_kernel(rows, places, offsets, out, num_sources, num_places, width, stride, BLOCK: tl.constexpr):
    source = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + source)
    end = tl.load(offsets + source + 1, mask=source + 1 < num_sources, other=num_places)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for at in range(begin, end):
        place = tl.load(places + at)
        total += tl.load(rows + place * stride + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + source * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _swiglu_kernel(hidden, gates, out, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = hidden + row * stride + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    active = gate * tl.sigmoid(gate) * up * tl.load(gates + row)
    tl.store(out + row * width + column, active.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_gradients_kernel(
    hidden, slopes, gates, grad_hidden, actives, grad_gates, width, stride, slope_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(gates + row)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < width
        at = hidden + row * stride + column
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(slopes + row * slope_stride + column, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += silu * up * slope
        active = silu * up * factor
        grad_up = slope * factor * silu
        grad_gate = slope * factor * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        at = grad_hidden + row * (2 * width) + column
        tl.store(at, grad_gate.to(grad_hidden.dtype.element_ty), mask=mask)
        tl.store(at + width, grad_up.to(grad_hidden.dtype.element_ty), mask=mask)
        tl.store(actives + row * width + column, active.to(actives.dtype.element_ty), mask=mask)
    tl.store(grad_gates + row, tl.sum(total, 0))
