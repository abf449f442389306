"""Orthogonalisation against the singular value decomposition."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_train.ops.newton_schulz import orthogonalize, products


def scalar(value: float) -> float:
    """What five steps make of one singular value."""
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5), (1, 1, 7)])
def test_singular_vectors_stay_and_values_go_through_the_polynomial(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    reached = torch.tensor([[scalar(v) for v in row] for row in values.tolist()], dtype=torch.float64)
    expected = left @ torch.diag_embed(reached) @ right
    torch.testing.assert_close(orthogonalize(x, 0.0, torch.float64), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(orthogonalize(x.float()), expected.float(), rtol=2e-3, atol=2e-3)


def test_values_come_near_one() -> None:
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.max() < 1.25 and values.median() > 0.7


def test_zero_gives_zero_and_scale_does_not_matter() -> None:
    assert orthogonalize(torch.zeros(2, 3, 4)).abs().max() == 0
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonalize(1e3 * x), orthogonalize(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_products_are_those_that_run(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.ones(1, *shape))
    assert counter.get_total_flops() == sum(2 * m * k * n for m, k, n in products(*shape))
