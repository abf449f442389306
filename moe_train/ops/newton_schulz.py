"""Orthogonalisation of matrices by Newton-Schulz iterations of the fifth order, for Muon.

Source: Jordan 2024, "Muon: An optimizer for hidden layers in neural networks".
Legend: n matrices, A rows, B columns.
"""

import torch
from torch import Tensor

STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # X <- a X + b (X X^T) X + c (X X^T)^2 X


def orthogonalize(x_nAB: Tensor, epsilon: float = 1e-7, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of matrices near 1, between about 0.7 and 1.2, and keep their singular vectors.

    Directions whose singular value is below about 1/500 of the matrix's norm stay smaller. Zero gives zero.

    Args:
        x_nAB: Matrices.
        epsilon: Constant that is added to a matrix's Frobenius norm, by which it is divided first.
        dtype: Arithmetic of the iterations. Below fp32, rounding decides small directions, so that results depend on
            the order of sums.

    Returns:
        [n, A, B] in the dtype of the argument.
    """
    is_tall = x_nAB.shape[-2] > x_nAB.shape[-1]
    x = (x_nAB.mT if is_tall else x_nAB).to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + epsilon)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if is_tall else x).to(x_nAB.dtype)


def products(rows: int, columns: int) -> list[tuple[int, int, int]]:
    """List the products of `orthogonalize` for one matrix, as (m, k, n) of [m, k] x [k, n]."""
    short, long = min(rows, columns), max(rows, columns)
    return [(short, long, short), (short, short, short), (short, short, long)] * STEPS
