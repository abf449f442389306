"""Moving token rows into expert order and back.

Legend: T tokens, K top_k, A = T*K assignments, R rows, D hidden_size, E experts.
"""

from typing import Any

import torch
from torch import Tensor


def sort_assignments(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Group the assignments by expert, in token order within an expert.

    Args:
        experts_TK: int64, the experts chosen by each token.
        num_experts: E.

    Returns:
        order_A: int64; place a of the grouped order holds assignment order_A[a] = t*K + k.
        counts_E: int64, assignments an expert.
    """
    flat_A = experts_TK.reshape(-1)  # (T, K) -> (T*K)
    order_A = torch.argsort(flat_A, stable=True)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_A.device)
    counts_E.scatter_add_(0, flat_A, torch.ones_like(flat_A))  # not bincount: it reads its maximum on the host
    return order_A, counts_E


def invert_permutation(order_A: Tensor) -> Tensor:
    """The inverse: inverse[order[a]] = a. int64, same shape."""
    inverse_A = torch.empty_like(order_A)
    inverse_A[order_A] = torch.arange(order_A.numel(), dtype=order_A.dtype, device=order_A.device)
    return inverse_A


class _PermuteRows(torch.autograd.Function):
    """rows[index] of a permutation; its gradient is a gather by the inverse, deterministic on every device."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, index_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, index_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_R), None, None


class _ExpandRows(torch.autograd.Function):
    """x[order // K]: each token's row once an assignment; its gradient gathers the K rows of a token and adds them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_A: Tensor, inverse_A: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_A)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_A // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_A,) = ctx.saved_tensors
        grad_AD = grads[0].index_select(0, inverse_A)
        grad_TKD = grad_AD.view(-1, ctx.top_k, grad_AD.shape[-1])  # (T*K, D) -> (T, K, D)
        return grad_TKD.sum(1), None, None, None


def permute_rows(rows_RD: Tensor, index_R: Tensor, inverse_R: Tensor) -> Tensor:
    """rows_RD[index_R] for a permutation and its inverse. Returns [R, D]."""
    return _PermuteRows.apply(rows_RD, index_R, inverse_R)


def expand_rows(x_TD: Tensor, order_A: Tensor, inverse_A: Tensor, top_k: int) -> Tensor:
    """Each token's row at the places of its K assignments. Returns [A, D]."""
    return _ExpandRows.apply(x_TD, order_A, inverse_A, top_k)


def weighted_sum(rows_AD: Tensor, gates_TK: Tensor, inverse_A: Tensor, order_A: Tensor) -> Tensor:
    """The gate-weighted sum of each token's K rows, accumulated in at least fp32.

    Args:
        rows_AD: Expert outputs in expert order.
        gates_TK: fp32 gates.
        inverse_A: From `invert_permutation(order_A)`.
        order_A: From `sort_assignments`.

    Returns:
        [T, D] of the rows' dtype.
    """
    shape = (*gates_TK.shape, rows_AD.shape[1])
    rows_TKD = permute_rows(rows_AD, inverse_A, order_A).view(shape)  # (T*K, D) -> (T, K, D)
    wide = torch.promote_types(rows_AD.dtype, torch.float32)
    return (rows_TKD.to(wide) * gates_TK.unsqueeze(-1).to(wide)).sum(1).to(rows_AD.dtype)
