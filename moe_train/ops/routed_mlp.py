"""SwiGLU of the experts on their routed rows, as one operation: gather, three matrix products, gates and sum.

Only the input, the first product and the gates are kept for the backward pass. The gate multiplies the activation,
before the last product. So the gradient of this product contains what the gradient of the gate needs, and the output is
not kept.

Source: gradient of the gate from the gradient of the activation, without the output: Guo et al. 2025 (SonicMoE), arXiv
2512.14080.
Legend: N source rows, R assignments in expert order, D hidden_size, F intermediate_size, e experts of this rank,
r assignments of one expert.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.ops.grouped_product import ExpertRows, rows_product, takes_grouped_products, weights_product
from moe_train.ops.kernels import kernels_for
from moe_train.ops.products import compiles_by_shape, mm, widened
from moe_train.ops.row_map import RowMap
from moe_train.ops.threads import run_side_by_side

# An expert computes a block of rows at once, whose temporary tensors fit the cache or are small beside what is kept:
# BLOCK_ROWS of them, or more where all rows would be more than NUM_BLOCKS blocks.
BLOCK_ROWS, NUM_BLOCKS = 384, 6
_BLOCK_UNIT = 64  # the ends of an expert's blocks are multiples of it, the last one excepted
LEAST_GRANULE = 16  # rows of a tile of AMX


def routed_swiglu(
    rows_ND: Tensor, gates_R: Tensor, row_map: RowMap, counts_e: Tensor, gate_up_eDG: Tensor, down_eFD: Tensor
) -> Tensor:
    """Sum gate x w_down(silu(x w_gate) * (x w_up)) over the experts that each source row x is routed to.

    Args:
        rows_ND: Source rows.
        gates_R: Gate of every assignment, in expert order; at least fp32.
        row_map: Source row of every assignment, in expert order.
        counts_e: int64, assignments per expert; zero is allowed.
        gate_up_eDG: [e, D, 2F], w_gate then w_up, in the dtype of the rows.
        down_eFD: [e, F, D], w_down, in the dtype of the rows.

    Returns:
        [N, D] in the dtype of the rows; zero for a row without an assignment.
    """
    if not _is_by_expert(rows_ND, gate_up_eDG):
        return _GroupedExperts.apply(rows_ND, gates_R, row_map, counts_e, gate_up_eDG, down_eFD)
    counts = counts_e.tolist()  # host synchronisation: slices need numbers
    if compiles_by_shape(rows_ND):
        gates_R, row_map, counts = _round_up_counts(gates_R, row_map, counts)
    return _SequentialExperts.apply(rows_ND, gates_R, row_map, counts, gate_up_eDG, down_eFD)


def _is_by_expert(rows_ND: Tensor, gate_up_eDG: Tensor) -> bool:
    # On CPU the rows of one expert fit the cache, and stay in it when experts are computed one after the other.
    return rows_ND.device.type == "cpu" or not takes_grouped_products(rows_ND, gate_up_eDG)


def _round_up_counts(gates_R: Tensor, row_map: RowMap, counts: list[int]) -> tuple[Tensor, RowMap, list[int]]:
    """Give every expert further assignments with gate 0 and without a source, so that counts take few values.

    oneDNN compiles each product of 16-bit numbers for its shape. A shape that it has not met takes 2 to 5 ms, where the
    product of 256 rows takes 0.2 ms; and the code of thousands of shapes takes hundreds of MiB.

    Returns:
        Gates, map and counts with the further assignments; gradients are those of the given gates.
    """
    rounded = [_round_up(count) for count in counts]
    if rounded == counts:
        return gates_R, row_map, counts
    further = [more - count for more, count in zip(rounded, counts, strict=True)]
    shifts_e = torch.tensor(list(itertools.accumulate(further[:-1], initial=0)))
    shifts_R = shifts_e.repeat_interleave(torch.tensor(counts), output_size=len(gates_R))
    places_R, total = torch.arange(len(gates_R)) + shifts_R, sum(rounded)
    return gates_R.new_zeros(total).index_copy(0, places_R, gates_R), row_map.moved_to(places_R, total), rounded


def _round_up(count: int) -> int:
    """Round up to a multiple of 16 or, for many rows, of at most a sixteenth of them."""
    granule = max(LEAST_GRANULE, (1 << count.bit_length()) // 32)
    return -(-count // granule) * granule


class _SequentialExperts(torch.autograd.Function):
    """Separate matrix products per expert: they take any dtype, but need the counts on the host."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, gates_R: Tensor, row_map: RowMap, counts: list[int], gate_up: Tensor, down: Tensor
    ) -> Tensor:
        source_R = row_map.source_R
        hidden_RG = rows_ND.new_empty(source_R.numel(), gate_up.shape[2])
        output_RD = rows_ND.new_empty(source_R.numel(), rows_ND.shape[1])

        def compute(_: _Block, source_r: Tensor, gates_r: Tensor, hidden_rG: Tensor, *parts: Tensor) -> None:
            output_rD, gate_up_DG, down_FD = parts
            product_rG = mm(widened(rows_ND.index_select(0, source_r)), gate_up_DG, out=hidden_rG)
            gate_rF, up_rF = product_rG.chunk(2, dim=-1)
            mm(_gate_(F.silu(gate_rF).mul_(up_rF), gates_r), down_FD, out=output_rD)

        _for_all_blocks(counts, compute, (source_R, gates_R, hidden_RG, output_RD), (gate_up, down))
        ctx.save_for_backward(rows_ND, gates_R, hidden_RG, gate_up, down)
        ctx.row_map, ctx.counts = row_map, counts
        return row_map.sum_rows(output_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gates_R, hidden_RG, gate_up, down = ctx.saved_tensors
        source_R = ctx.row_map.source_R
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                grad_gate_up[expert], grad_down[expert] = 0.0, 0.0
        grad_gates_R, grad_rows_RD = torch.empty_like(gates_R), rows_ND.new_empty(len(gates_R), rows_ND.shape[1])
        sums = _BlockSums()

        def compute(block: _Block, source_r: Tensor, gates_r: Tensor, hidden_rG: Tensor, *parts: Tensor) -> None:
            grad_gates_r, grad_rows_rD, gate_up_DG, down_FD, grad_gate_up_DG, grad_down_FD = parts
            grad_rD = widened(grads[0].index_select(0, source_r))
            slope_rF = mm(grad_rD, down_FD.t())
            grad_hidden_rG, active_rF = _activation_gradients(widened(hidden_rG), slope_rF, gates_r, grad_gates_r)
            sums.add(grad_down_FD, active_rF.t(), grad_rD, block)
            sums.add(grad_gate_up_DG, widened(rows_ND.index_select(0, source_r)).t(), grad_hidden_rG, block)
            mm(grad_hidden_rG, gate_up_DG.t(), out=grad_rows_rD)

        by_row = (source_R, gates_R, hidden_RG, grad_gates_R, grad_rows_RD)
        _for_all_blocks(ctx.counts, compute, by_row, (gate_up, down, grad_gate_up, grad_down))
        return ctx.row_map.sum_rows(grad_rows_RD), grad_gates_R, None, None, grad_gate_up, grad_down


class _GroupedExperts(torch.autograd.Function):
    """Grouped matrix products of all experts; Triton kernels do the rest where they run."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, gates_R: Tensor, row_map: RowMap, counts_e: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        rows = ExpertRows.of(counts_e, rows_ND.dtype)
        hidden_RG = rows_product(row_map.gather(rows_ND), gate_up, rows)
        output_RD = rows_product(_fused_activation(hidden_RG, gates_R), down, rows)
        ctx.save_for_backward(rows_ND, gates_R, hidden_RG, gate_up, down)
        ctx.row_map, ctx.rows = row_map, rows
        return row_map.sum_rows(output_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gates_R, hidden_RG, gate_up, down = ctx.saved_tensors
        grad_RD = ctx.row_map.gather(grads[0])
        slope_RF = rows_product(grad_RD, down.transpose(1, 2), ctx.rows)
        grad_hidden_RG, active_RF, grad_gates_R = _fused_activation_gradients(hidden_RG, slope_RF, gates_R)
        grad_down = weights_product(active_RF, grad_RD, ctx.rows)
        del grad_RD, active_RF
        grad_gate_up = weights_product(ctx.row_map.gather(rows_ND), grad_hidden_RG, ctx.rows)
        grad_rows_RD = rows_product(grad_hidden_RG, gate_up.transpose(1, 2), ctx.rows)
        return ctx.row_map.sum_rows(grad_rows_RD), grad_gates_R, None, None, grad_gate_up, grad_down


@dataclass(frozen=True)
class _Block:
    """Consecutive assignments of one expert.

    Attributes:
        num_rows: Number of assignments.
        is_first: Whether it is the first block of the expert.
        is_last: Whether it is the last block of the expert.
    """

    num_rows: int
    is_first: bool
    is_last: bool


def _for_all_blocks(
    counts: Sequence[int], compute: Callable[..., None], by_row: Sequence[Tensor], by_expert: Sequence[Tensor]
) -> None:
    """Compute the blocks of every expert in order; on CPU, experts with few rows run in parallel, in torch's threads.

    Args:
        counts: Assignments of every expert.
        compute: Called with a block, its rows of each tensor in by_row, and the expert's element of each tensor in
            by_expert.
        by_row: Tensors with one row per assignment.
        by_expert: Tensors with one element per expert.
    """
    rows = list(zip(*(tensor.split(list(counts)) for tensor in by_row), strict=True))
    elements = list(zip(*(tensor.unbind(0) for tensor in by_expert), strict=True))
    most_rows = max(BLOCK_ROWS, sum(counts) // NUM_BLOCKS)

    def compute_expert(expert: int) -> None:
        blocks, parts = _blocks(counts[expert], most_rows), [rows[expert]]
        if len(blocks) > 1:
            parts = list(zip(*(part.split([block.num_rows for block in blocks]) for part in rows[expert]), strict=True))
        for block, own in zip(blocks, parts, strict=True):
            compute(block, *own, *elements[expert])

    num_threads = torch.get_num_threads() if by_row[0].device.type == "cpu" else 1  # each thread has its own streams
    busy = sum(counts) / (2 * num_threads)  # an expert with more rows runs in all threads, or these would wait for it
    experts = [expert for expert, count in enumerate(counts) if count]
    for expert in experts:
        if counts[expert] > busy:
            compute_expert(expert)
    others = [partial(compute_expert, expert) for expert in experts if counts[expert] <= busy]
    run_side_by_side(others, num_threads)


def _blocks(count: int, most_rows: int) -> list[_Block]:
    """Divide the assignments of an expert into blocks of nearly the same size, and of few sizes."""
    num_blocks, unit = -(-count // most_rows), max(1, min(_BLOCK_UNIT, most_rows // 4))
    ends = [-(-(number * count // num_blocks) // unit) * unit for number in range(num_blocks)] + [count]
    return [_Block(end - begin, is_first=begin == 0, is_last=end == count) for begin, end in itertools.pairwise(ends)]


class _BlockSums:
    """Sums of the products of an expert's blocks, accumulated in at least fp32 and rounded once."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # sums of unfinished experts, by the address of the result

    def add(self, out: Tensor, left: Tensor, right: Tensor, block: _Block) -> None:
        """Add the product left @ right of a block; after the last block of the expert, `out` holds the sum."""
        is_narrow = out.dtype != torch.promote_types(out.dtype, torch.float32)
        if is_narrow and not (block.is_first and block.is_last):
            product = mm(left, right).to(torch.float32)
            self._sums[out.data_ptr()] = product if block.is_first else self._sums[out.data_ptr()].add_(product)
            if block.is_last:
                out.copy_(self._sums.pop(out.data_ptr()))
        elif block.is_first:
            mm(left, right, out=out)
        else:
            out.addmm_(left, right)


def _gate_(active_rF: Tensor, gates_r: Tensor) -> Tensor:
    """Multiply the activation in place by the gate; only the product is rounded."""
    return active_rF.mul_(gates_r.unsqueeze(1))


def _activation_gradients(
    hidden_rG: Tensor, slope_rF: Tensor, gates_r: Tensor, grad_gates_r: Tensor
) -> tuple[Tensor, Tensor]:
    """Recompute the activation, and compute the gradients of the first product and of the gates.

    Args:
        hidden_rG: First product.
        slope_rF: Gradient with respect to the activation times the gate. It is overwritten.
        gates_r: Gates.
        grad_gates_r: Receives the gradient of the gates.

    Returns:
        Gradient of the first product, and the activation times the gate.
    """
    gate_rF, up_rF = hidden_rG.chunk(2, dim=-1)
    grad_hidden_rG = torch.empty_like(hidden_rG)
    # Each half first holds a temporary value, then its gradient. This memory is in the cache, and no more is needed.
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
    """Compute silu(gate half) * up half * gate of the row, [R, F], by one Triton kernel where it runs."""
    if kernels := kernels_for(hidden_RG, gates_R):
        return kernels.gated_swiglu(hidden_RG, gates_R)
    gate_RF, up_RF = hidden_RG.chunk(2, dim=-1)
    return _gate_(F.silu(gate_RF).mul_(up_RF), gates_R)


def _fused_activation_gradients(hidden_RG: Tensor, slope_RF: Tensor, gates_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the results of `_activation_gradients` and the gates' gradient, by one Triton kernel where it runs."""
    if kernels := kernels_for(hidden_RG, slope_RF, gates_R):
        return kernels.gated_swiglu_gradients(hidden_RG, slope_RF, gates_R)
    grad_gates_R = torch.empty_like(gates_R)
    return *_activation_gradients(hidden_RG, slope_RF, gates_R, grad_gates_R), grad_gates_R
