"""Expert capacity: which assignments stay when every expert takes a limited number of them.

Legend: T tokens, K top_k, A = T*K assignments, E experts.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Compute the capacity of an expert: ceil(tokens x top_k / num_experts x factor) assignments, at least 1.

    Args:
        num_tokens: Tokens that share the capacity.
        top_k: K, experts per token.
        num_experts: E, number of experts.
        factor: Capacity as a multiple of the mean assignments per expert.

    Source: arXiv 2006.16668.
    """
    # Exact arithmetic: 1.1 means eleven tenths, and the rounding of a float product must not add a place.
    return max(1, math.ceil(Fraction(num_tokens * top_k, num_experts) * Fraction(str(factor))))


def within_capacity(
    experts_TK: Tensor, priority_TK: Tensor | None, num_experts: int, capacity: int, num_scopes: int
) -> Tensor:
    """Mark the assignments among the first `capacity` of their expert, in each scope of consecutive tokens.

    Args:
        experts_TK: int64, the experts chosen by each token.
        priority_TK: Priority of each assignment; the largest comes first, and of equal ones the earlier. None: the
            earlier tokens come first.
        num_experts: E, number of experts.
        capacity: Assignments that an expert takes per scope.
        num_scopes: Number of scopes, equal parts of the tokens; must divide T.

    Returns:
        bool [T, K], True where the assignment stays.
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
    first_A = (sizes.cumsum(0) - sizes)[bucket_A[order_A]]  # start of the bucket of each place
    place_A = torch.arange(bucket_A.numel(), device=bucket_A.device) - first_A
    kept_A = torch.empty_like(bucket_A, dtype=torch.bool)
    kept_A[order_A] = place_A < capacity
    return kept_A.view(num_tokens, top_k)
