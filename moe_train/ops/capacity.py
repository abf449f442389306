"""Which assignments fit where every expert takes a bounded number of them.

Legend: T tokens, K top_k, A = T*K assignments, E experts.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Most assignments an expert takes: ceil(tokens x top_k / num_experts x factor), at least 1 (arXiv 2006.16668)."""
    # Exact: 1.1 means eleven tenths, and no rounding of a product may add a place.
    return max(1, math.ceil(Fraction(num_tokens * top_k, num_experts) * Fraction(str(factor))))


def within_capacity(
    experts_TK: Tensor, priority_TK: Tensor | None, num_experts: int, capacity: int, num_scopes: int
) -> Tensor:
    """The assignments that are among the first `capacity` of their expert, in each scope of consecutive tokens.

    Args:
        experts_TK: int64, the chosen experts.
        priority_TK: What decides, the largest first and the earlier of equal ones; None: the earlier tokens.
        num_experts: E.
        capacity: Assignments an expert takes in a scope.
        num_scopes: Scopes that the tokens fall into; divides T.

    Returns:
        bool [T, K].
    """
    num_tokens, top_k = experts_TK.shape
    scopes_T = torch.arange(num_scopes, device=experts_TK.device).repeat_interleave(
        num_tokens // num_scopes, output_size=num_tokens
    )
    bucket_A = (scopes_T.unsqueeze(1) * num_experts + experts_TK).reshape(-1)  # (T, K) -> (T*K)
    if priority_TK is None:
        order_A = torch.argsort(bucket_A, stable=True)
    else:
        ranked_A = torch.argsort(priority_TK.detach().reshape(-1), descending=True, stable=True)
        order_A = ranked_A[torch.argsort(bucket_A[ranked_A], stable=True)]
    sizes = torch.zeros(num_scopes * num_experts, dtype=torch.int64, device=bucket_A.device)
    sizes.scatter_add_(0, bucket_A, torch.ones_like(bucket_A))
    first_A = (sizes.cumsum(0) - sizes)[bucket_A[order_A]]  # where the bucket of each place begins
    place_A = torch.arange(bucket_A.numel(), device=bucket_A.device) - first_A
    kept_A = torch.empty_like(bucket_A, dtype=torch.bool)
    kept_A[order_A] = place_A < capacity
    return kept_A.view(num_tokens, top_k)
