"""Moving token rows into expert order and back.

Legend: T tokens, K top_k, A = T*K assignments, R rows (executed assignments), Q rows wanted, D hidden_size, E experts.
"""

from typing import Any

import torch
from torch import Tensor


def sort_assignments(experts_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Group the assignments by expert, in token order within an expert.

    Args:
        experts_TK: int64, the experts chosen by each token.
        num_experts: E.
        kept_TK: bool, assignments that are executed; None: all.

    Returns:
        order_A: int64; place a of the grouped order holds assignment order_A[a] = t*K + k. Those that are not executed
            stand behind the others.
        counts_E: int64, executed assignments an expert.
    """
    flat_A = experts_TK.reshape(-1)  # (T, K) -> (T*K)
    if kept_TK is not None:
        flat_A = flat_A.masked_fill(~kept_TK.reshape(-1), num_experts)
    order_A = torch.argsort(flat_A, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_A.device)
    counts.scatter_add_(0, flat_A, torch.ones_like(flat_A))  # not bincount: it reads its maximum on the host
    return order_A, counts[:num_experts]


def invert_order(order_R: Tensor, size: int | None = None) -> Tensor:
    """The inverse of an order: inverse[order[r]] = r, and R, the place after the last, for what the order leaves out.

    Args:
        order_R: int64, distinct numbers below size.
        size: Numbers there are; None: R, the order being a permutation.

    Returns:
        int64 [size].
    """
    num_places = order_R.numel()
    if size is None or size == num_places:
        inverse = torch.empty_like(order_R)
    else:
        inverse = torch.full((size,), num_places, dtype=order_R.dtype, device=order_R.device)
    inverse[order_R] = torch.arange(num_places, dtype=order_R.dtype, device=order_R.device)
    return inverse


class _GatherRows(torch.autograd.Function):
    """rows[index], zero where it is R; its gradient is a gather by the inverse, deterministic on every device."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, index_Q: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return _gather(rows_RD, index_Q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return _gather(grads[0], inverse_R), None, None


class _ExpandRows(torch.autograd.Function):
    """x[order // K]: each token's row once an assignment; its gradient gathers the K rows of a token and adds them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_A: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_A)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_R // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_A,) = ctx.saved_tensors
        grad_AD = _gather(grads[0], inverse_A)
        grad_TKD = grad_AD.view(-1, ctx.top_k, grad_AD.shape[-1])  # (T*K, D) -> (T, K, D)
        return grad_TKD.sum(1), None, None, None


def _gather(rows_RD: Tensor, index_Q: Tensor) -> Tensor:
    # More wanted than there are: some places of the index are R, and a row of zeros stands there.
    if index_Q.numel() > rows_RD.shape[0]:
        rows_RD = torch.cat((rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])))
    return rows_RD.index_select(0, index_Q)


def gather_rows(rows_RD: Tensor, index_Q: Tensor, inverse_R: Tensor) -> Tensor:
    """rows_RD[index_Q], where every row is taken once and an index of R gives zeros. Returns [Q, D].

    Args:
        rows_RD: Rows.
        index_Q: int64; its places below R are distinct and all there.
        inverse_R: int64, where each row is taken to: index_Q = invert_order(inverse_R, Q).
    """
    return _GatherRows.apply(rows_RD, index_Q, inverse_R)


def expand_rows(x_TD: Tensor, order_R: Tensor, inverse_A: Tensor, top_k: int) -> Tensor:
    """Each token's row at the places of its executed assignments. Returns [R, D].

    Args:
        x_TD: Token rows.
        order_R: int64, the executed assignments in expert order.
        inverse_A: From `invert_order(order_R, T*K)`.
        top_k: K.
    """
    return _ExpandRows.apply(x_TD, order_R, inverse_A, top_k)


def weighted_sum(rows_RD: Tensor, gates_TK: Tensor, inverse_A: Tensor, order_R: Tensor) -> Tensor:
    """The gate-weighted sum of each token's rows, accumulated in at least fp32; what was not executed adds nothing.

    Args:
        rows_RD: Expert outputs in expert order.
        gates_TK: fp32 gates.
        inverse_A: From `invert_order(order_R, T*K)`.
        order_R: int64, the executed assignments in expert order.

    Returns:
        [T, D] of the rows' dtype.
    """
    shape = (*gates_TK.shape, rows_RD.shape[1])
    rows_TKD = gather_rows(rows_RD, inverse_A, order_R).view(shape)  # (T*K, D) -> (T, K, D)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    return (rows_TKD.to(wide) * gates_TK.unsqueeze(-1).to(wide)).sum(1).to(rows_RD.dtype)
