"""The experts' SwiGLUs over rows that are routed to them: gather, three matrix products, gates and the sum, as one.

Nothing is kept for the backward pass but the input, the first product and the gates. The gate is multiplied into the
activation, before the last product: so the product's own gradient holds what the gate's gradient needs, and neither the
experts' outputs nor their gradients are ever stored by assignment.

Source: the gate's gradient from the activation's, without the output: Guo et al. 2025 (SonicMoE), arXiv 2512.14080.
Legend: N source rows, R assignments in expert order, D hidden_size, F intermediate_size, e experts of this rank,
r assignments of one expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.ops.kernels import kernels_for
from moe_train.ops.row_map import RowMap

_MOST_ROWS = 384  # that an expert takes at once on a CPU: what they bring with them fits the cache


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
    """One expert after the other, of a busy one a block of rows: any dtype, at the price of reading the counts.

    What a block gives is added to its rows at once, while it is in the cache: nothing but the first product has a row
    for every assignment.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, gates_R: Tensor, row_map: RowMap, counts_e: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        blocks = _blocks(counts_e.tolist())  # host synchronisation: slices need numbers
        hidden_RG = rows_ND.new_empty(row_map.source_R.numel(), gate_up.shape[2])
        output_ND = _zero_sums(rows_ND)
        for source_r, gates_r, hidden_rG, gate_up_DG, down_FD in _parts(
            blocks, (row_map.source_R, gates_R, hidden_RG), (gate_up, down)
        ):
            torch.mm(rows_ND.index_select(0, source_r), gate_up_DG, out=hidden_rG)
            gate_rF, up_rF = hidden_rG.chunk(2, dim=-1)
            active_rF = _gate_(F.silu(gate_rF).mul_(up_rF), gates_r)
            output_ND.index_add_(0, source_r, torch.mm(active_rF, down_FD).to(output_ND.dtype))
        ctx.save_for_backward(rows_ND, gates_R, hidden_RG, gate_up, down, row_map.source_R)
        ctx.blocks = blocks
        return output_ND.to(rows_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gates_R, hidden_RG, gate_up, down, source_R = ctx.saved_tensors
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for expert in set(range(len(gate_up))) - {block.expert for block in ctx.blocks}:
            grad_gate_up[expert], grad_down[expert] = 0.0, 0.0
        grad_gates_R, grad_rows_ND = torch.empty_like(gates_R), _zero_sums(rows_ND)
        sums = _BlockSums()
        parts = _parts(
            ctx.blocks, (source_R, gates_R, hidden_RG, grad_gates_R), (gate_up, down, grad_gate_up, grad_down)
        )
        for block, (source_r, gates_r, hidden_rG, grad_gates_r, *weights) in zip(ctx.blocks, parts, strict=True):
            gate_up_DG, down_FD, grad_gate_up_DG, grad_down_FD = weights
            grad_rD = grads[0].index_select(0, source_r)
            slope_rF = torch.mm(grad_rD, down_FD.t())
            grad_hidden_rG, active_rF = _activation_gradients(hidden_rG, slope_rF, gates_r, grad_gates_r)
            sums.add(grad_down_FD, active_rF.t(), grad_rD, block)
            sums.add(grad_gate_up_DG, rows_ND.index_select(0, source_r).t(), grad_hidden_rG, block)
            grad_rows_ND.index_add_(0, source_r, torch.mm(grad_hidden_rG, gate_up_DG.t()).to(grad_rows_ND.dtype))
        return grad_rows_ND.to(rows_ND.dtype), grad_gates_R, None, None, grad_gate_up, grad_down


class _Together(torch.autograd.Function):
    """All experts in grouped products, without looking at the counts; what lies between by kernels where they run."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, gates_R: Tensor, row_map: RowMap, counts_e: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        offsets_e = counts_e.cumsum(0).to(torch.int32)
        hidden_RG = F.grouped_mm(row_map.spread_rows(rows_ND), gate_up, offs=offsets_e)
        output_RD = F.grouped_mm(_fused_activation(hidden_RG, gates_R), down, offs=offsets_e)
        ctx.save_for_backward(rows_ND, gates_R, hidden_RG, gate_up, down, offsets_e)
        ctx.row_map = row_map
        return row_map.sum_rows(output_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gates_R, hidden_RG, gate_up, down, offsets_e = ctx.saved_tensors
        grad_RD = ctx.row_map.spread_rows(grads[0])
        slope_RF = F.grouped_mm(grad_RD, down.transpose(1, 2), offs=offsets_e)
        grad_hidden_RG, active_RF, grad_gates_R = _fused_activation_gradients(hidden_RG, slope_RF, gates_R)
        grad_down = F.grouped_mm(active_RF.t(), grad_RD, offs=offsets_e)
        del grad_RD, active_RF
        grad_gate_up = F.grouped_mm(ctx.row_map.spread_rows(rows_ND).t(), grad_hidden_RG, offs=offsets_e)
        grad_rows_RD = F.grouped_mm(grad_hidden_RG, gate_up.transpose(1, 2), offs=offsets_e)
        return ctx.row_map.sum_rows(grad_rows_RD), grad_gates_R, None, None, grad_gate_up, grad_down


@dataclass(frozen=True)
class _Block:
    """Consecutive assignments of one expert.

    Attributes:
        expert: Of this rank.
        num_rows: How many.
        is_first: Whether it is the expert's first block.
        is_last: Whether it is the expert's last block.
    """

    expert: int
    num_rows: int
    is_first: bool
    is_last: bool


def _blocks(counts: Sequence[int]) -> list[_Block]:
    """All assignments, in order; an expert's in blocks of nearly one size."""
    found = []
    for expert, count in enumerate(counts):
        num_blocks = -(-count // _MOST_ROWS)
        for number in range(num_blocks):
            num_rows = (number + 1) * count // num_blocks - number * count // num_blocks
            found.append(_Block(expert, num_rows, number == 0, number == num_blocks - 1))
    return found


def _parts(
    blocks: Sequence[_Block], by_row: Sequence[Tensor], by_expert: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """The parts of every block: its rows of the first tensors, its expert's element of the others."""
    rows = zip(*(tensor.split([block.num_rows for block in blocks]) for tensor in by_row), strict=True)
    weights = list(zip(*(tensor.unbind(0) for tensor in by_expert), strict=True))
    return ((*own, *weights[block.expert]) for block, own in zip(blocks, rows, strict=True))


class _BlockSums:
    """Adds up the products of an expert's blocks in at least fp32, and rounds the sum once."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # of the expert at hand, by the address of the result

    def add(self, out: Tensor, left: Tensor, right: Tensor, block: _Block) -> None:
        """Add the product left @ right of a block; after the expert's last one, `out` is the sum."""
        is_narrow = out.dtype != torch.promote_types(out.dtype, torch.float32)
        if is_narrow and not (block.is_first and block.is_last):
            product = torch.mm(left, right).to(torch.float32)
            self._sums[out.data_ptr()] = product if block.is_first else self._sums[out.data_ptr()].add_(product)
            if block.is_last:
                out.copy_(self._sums.pop(out.data_ptr()))
        elif block.is_first:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)


def _zero_sums(rows_ND: Tensor) -> Tensor:
    """Zeros to which rows are added, of at least fp32."""
    return torch.zeros_like(rows_ND, dtype=torch.promote_types(rows_ND.dtype, torch.float32))


def _gate_(active_rF: Tensor, gates_r: Tensor) -> Tensor:
    """Multiplies the activation, in its place, by the gate, which is rounded only with the product."""
    return active_rF.mul_(gates_r.unsqueeze(1))


def _activation_gradients(
    hidden_rG: Tensor, slope_rF: Tensor, gates_r: Tensor, grad_gates_r: Tensor
) -> tuple[Tensor, Tensor]:
    """What the backward pass needs of the activation, which is computed again.

    Args:
        hidden_rG: The first product.
        slope_rF: Gradient of the output with respect to the activation, before the gate. It is used up.
        gates_r: The gates.
        grad_gates_r: Gets the gradient of the gates.

    Returns:
        Gradient of the first product, and the activation times the gate.
    """
    gate_rF, up_rF = hidden_rG.chunk(2, dim=-1)
    grad_hidden_rG = torch.empty_like(hidden_rG)
    # Each half holds something else before it gets its gradient: memory that is in the cache, and no more of it.
    grad_gate_rF, grad_up_rF = grad_hidden_rG.chunk(2, dim=-1)
    silu_rF = torch.ops.aten.silu.out(gate_rF, out=grad_up_rF)
    active_rF = silu_rF * up_rF
    torch.sum(torch.mul(active_rF, slope_rF, out=grad_gate_rF), 1, dtype=gates_r.dtype, out=grad_gates_r)
    _gate_(active_rF, gates_r)
    grad_active_rF = _gate_(slope_rF, gates_r)
    grad_up_rF.mul_(grad_active_rF)
    torch.ops.aten.silu_backward.grad_input(grad_active_rF.mul_(up_rF), gate_rF, grad_input=grad_gate_rF)
    return grad_hidden_rG, active_rF


def _fused_activation(hidden_RG: Tensor, gates_R: Tensor) -> Tensor:
    """silu(gate half) * up half * the row's gate, by one kernel where there is one. [R, F]."""
    if kernels := kernels_for(hidden_RG, gates_R):
        return kernels.gated_swiglu(hidden_RG, gates_R)
    gate_RF, up_RF = hidden_RG.chunk(2, dim=-1)
    return _gate_(F.silu(gate_RF).mul_(up_RF), gates_R)


def _fused_activation_gradients(hidden_RG: Tensor, slope_RF: Tensor, gates_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_activation_gradients` computes, and the gradient of the gates, by one kernel where there is one."""
    if kernels := kernels_for(hidden_RG, slope_RF, gates_R):
        return kernels.gated_swiglu_gradients(hidden_RG, slope_RF, gates_R)
    grad_gates_R = torch.empty_like(gates_R)
    return *_activation_gradients(hidden_RG, slope_RF, gates_R, grad_gates_R), grad_gates_R


def _has_grouped_mm(rows_RM: Tensor, weight_eMN: Tensor) -> bool:
    # torch 2.13 refuses fp64, and rows that are no multiple of 16 bytes; F.grouped_mm is public since 2.10.
    if not hasattr(F, "grouped_mm") or rows_RM.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * rows_RM.element_size() % 16 == 0 for width in weight_eMN.shape[1:])
