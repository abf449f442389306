"""Order of the assignments by expert.

Legend: T tokens, K top_k, A = T*K assignments, R places, E experts.
"""

import torch
from torch import Tensor


def sort_assignments(experts_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Group the assignments by expert, in token order within an expert.

    Args:
        experts_TK: int64, the experts chosen by each token.
        num_experts: E, number of experts.
        kept_TK: bool, True for the assignments that are executed; None: all.

    Returns:
        order_A: int64; place a of the grouped order holds assignment order_A[a] = t*K + k. Assignments that are not
            executed come last.
        counts_E: int64, executed assignments per expert.
    """
    flat_A = experts_TK.reshape(-1)  # (T, K) -> (T*K)
    if kept_TK is not None:
        flat_A = flat_A.masked_fill(~kept_TK.reshape(-1), num_experts)
    order_A = torch.argsort(sort_keys(flat_A, num_experts + 1), stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_A.device)
    counts.scatter_add_(0, flat_A, torch.ones_like(flat_A))  # not bincount, which reads its maximum on the host
    return order_A, counts[:num_experts]


def sort_keys(numbers: Tensor, limit: int) -> Tensor:
    """Narrow numbers below a limit for a sort: on CUDA it makes one pass for every 8 bits of a key.

    Args:
        numbers: int64, from 0 to limit - 1.
        limit: Number above all of them.
    """
    if not numbers.is_cuda or limit > 2**31:
        return numbers
    return numbers.to(torch.int16 if limit <= 2**15 else torch.int32)


def invert_order(order_R: Tensor) -> Tensor:
    """Invert a permutation: inverse[order[r]] = r.

    Args:
        order_R: int64, a permutation of range(R).

    Returns:
        int64 [R].
    """
    inverse = torch.empty_like(order_R)
    inverse[order_R] = torch.arange(order_R.numel(), dtype=order_R.dtype, device=order_R.device)
    return inverse
