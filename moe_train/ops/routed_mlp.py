"""The experts' SwiGLUs over rows that are routed to them: gather, three matrix products, gates and the sum, as one.

Nothing is kept for the backward pass but the input, the first product and the gates. The gate is multiplied into the
activation, before the last product: so the product's own gradient holds what the gate's gradient needs, and neither the
experts' outputs nor their gradients are ever stored by assignment.

Source: the gate's gradient from the activation's, without the output: Guo et al. 2025 (SonicMoE), arXiv 2512.14080.
Legend: N source rows, R assignments in expert order, D hidden_size, F intermediate_size, e experts of this rank,
r assignments of one expert.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.ops.row_map import RowMap


def routed_swiglu(
    rows_ND: Tensor, gates_R: Tensor, row_map: RowMap, counts_e: Tensor, gate_up_eDG: Tensor, down_eFD: Tensor
) -> Tensor:
    """Each source row's sum of gate x w_down(silu(x w_gate) * (x w_up)) over the experts it is routed to.

    Args:
        rows_ND: Source rows.
        gates_R: At least fp32, the factor of every assignment, in expert order.
        row_map: The source row of every assignment, in expert order.
        counts_e: int64, assignments an expert; zero is allowed.
        gate_up_eDG: [e, D, 2F], w_gate then w_up, of the rows' dtype.
        down_eFD: [e, F, D].

    Returns:
        [N, D] of the rows' dtype; zero for a row that is routed nowhere.
    """
    # On CPU an expert's rows fit the cache, and experts one after the other never leave it.
    in_turn = rows_ND.device.type == "cpu" or not _has_grouped_mm(rows_ND, gate_up_eDG)
    function = _InTurn if in_turn else _Together
    return function.apply(rows_ND, gates_R, row_map, counts_e, gate_up_eDG, down_eFD)


class _InTurn(torch.autograd.Function):
    """One expert after the other: any dtype, at the price of reading the counts on the host."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, gates_R: Tensor, row_map: RowMap, counts_e: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        counts = counts_e.tolist()  # host synchronisation: slices need numbers
        num_rows = row_map.source_R.numel()
        hidden_RG = rows_ND.new_empty(num_rows, gate_up.shape[2])
        output_RD = rows_ND.new_empty(num_rows, rows_ND.shape[1])
        parts = _by_expert(counts, (row_map.source_R, gates_R, hidden_RG, output_RD), (gate_up, down))
        for source_r, gates_r, hidden_rG, output_rD, gate_up_DG, down_FD in parts:
            torch.mm(rows_ND.index_select(0, source_r), gate_up_DG, out=hidden_rG)
            gate_rF, up_rF = hidden_rG.chunk(2, dim=-1)
            torch.mm(_gated(F.silu(gate_rF).mul_(up_rF), gates_r), down_FD, out=output_rD)
        ctx.save_for_backward(rows_ND, gates_R, hidden_RG, gate_up, down)
        ctx.row_map, ctx.counts = row_map, counts
        return row_map.sum_rows(output_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gates_R, hidden_RG, gate_up, down = ctx.saved_tensors
        grad_ND = grads[0].contiguous()  # a sum's gradient is expanded
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                grad_gate_up[expert], grad_down[expert] = 0.0, 0.0
        grad_gates_R, grad_rows_RD = torch.empty_like(gates_R), rows_ND.new_empty(len(gates_R), rows_ND.shape[1])
        by_row = (ctx.row_map.source_R, gates_R, hidden_RG, grad_gates_R, grad_rows_RD)
        by_expert = (gate_up, down, grad_gate_up, grad_down)
        for source_r, gates_r, hidden_rG, grad_gates_r, grad_rows_rD, *weights in _by_expert(
            ctx.counts, by_row, by_expert
        ):
            gate_up_DG, down_FD, grad_gate_up_DG, grad_down_FD = weights
            grad_rD, rows_rD = grad_ND.index_select(0, source_r), rows_ND.index_select(0, source_r)
            slope_rF = torch.mm(grad_rD, down_FD.t())
            grad_hidden_rG, active_rF, found_r = _activation_gradients(hidden_rG, slope_rF, gates_r)
            grad_gates_r.copy_(found_r)
            torch.mm(active_rF.t(), grad_rD, out=grad_down_FD)
            torch.mm(rows_rD.t(), grad_hidden_rG, out=grad_gate_up_DG)
            torch.mm(grad_hidden_rG, gate_up_DG.t(), out=grad_rows_rD)
        return ctx.row_map.sum_rows(grad_rows_RD), grad_gates_R, None, None, grad_gate_up, grad_down


class _Together(torch.autograd.Function):
    """All experts in grouped products, without looking at the counts."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, gates_R: Tensor, row_map: RowMap, counts_e: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        offsets_e = counts_e.cumsum(0).to(torch.int32)
        hidden_RG = F.grouped_mm(row_map.spread_rows(rows_ND), gate_up, offs=offsets_e)
        gate_RF, up_RF = hidden_RG.chunk(2, dim=-1)
        output_RD = F.grouped_mm(_gated(F.silu(gate_RF).mul_(up_RF), gates_R), down, offs=offsets_e)
        ctx.save_for_backward(rows_ND, gates_R, hidden_RG, gate_up, down, offsets_e)
        ctx.row_map = row_map
        return row_map.sum_rows(output_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gates_R, hidden_RG, gate_up, down, offsets_e = ctx.saved_tensors
        grad_RD = ctx.row_map.spread_rows(grads[0])
        slope_RF = F.grouped_mm(grad_RD, down.transpose(1, 2), offs=offsets_e)
        grad_hidden_RG, active_RF, grad_gates_R = _activation_gradients(hidden_RG, slope_RF, gates_R)
        grad_down = F.grouped_mm(active_RF.t(), grad_RD, offs=offsets_e)
        del grad_RD, active_RF
        grad_gate_up = F.grouped_mm(ctx.row_map.spread_rows(rows_ND).t(), grad_hidden_RG, offs=offsets_e)
        grad_rows_RD = F.grouped_mm(grad_hidden_RG, gate_up.transpose(1, 2), offs=offsets_e)
        return ctx.row_map.sum_rows(grad_rows_RD), grad_gates_R, None, None, grad_gate_up, grad_down


def _by_expert(
    counts: list[int], by_row: Sequence[Tensor], by_expert: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """The parts of every expert that has assignments: its rows of the first tensors, its element of the others."""
    parts = (*(tensor.split(counts) for tensor in by_row), *(tensor.unbind(0) for tensor in by_expert))
    return (part for count, part in zip(counts, zip(*parts, strict=True), strict=True) if count)


def _gated(active_rF: Tensor, gates_r: Tensor) -> Tensor:
    """The activation times the gate, which is rounded only with the product."""
    return (active_rF * gates_r.unsqueeze(1)).to(active_rF.dtype)


def _activation_gradients(hidden_rG: Tensor, slope_rF: Tensor, gates_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass needs of the activation, which is computed again.

    Args:
        hidden_rG: The first product.
        slope_rF: Gradient of the output with respect to the activation, before the gate.
        gates_r: The gates.

    Returns:
        Gradient of the first product, the activation times the gate, and the gradient of the gates.
    """
    gate_rF, up_rF = hidden_rG.chunk(2, dim=-1)
    silu_rF = F.silu(gate_rF)
    active_rF = silu_rF * up_rF
    grad_gates_r = (active_rF * slope_rF).sum(1, dtype=gates_r.dtype)
    grad_active_rF = _gated(slope_rF, gates_r)
    grad_hidden_rG = torch.empty_like(hidden_rG)
    grad_gate_rF, grad_up_rF = grad_hidden_rG.chunk(2, dim=-1)
    torch.mul(grad_active_rF, silu_rF, out=grad_up_rF)
    grad_gate_rF.copy_(torch.ops.aten.silu_backward(grad_active_rF.mul_(up_rF), gate_rF))
    return grad_hidden_rG, _gated(active_rF, gates_r), grad_gates_r


def _has_grouped_mm(rows_RM: Tensor, weight_eMN: Tensor) -> bool:
    # torch 2.13 refuses fp64, and rows that are no multiple of 16 bytes; F.grouped_mm is public since 2.10.
    if not hasattr(F, "grouped_mm") or rows_RM.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * rows_RM.element_size() % 16 == 0 for width in weight_eMN.shape[1:])
