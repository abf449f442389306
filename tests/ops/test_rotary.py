"""Rotary embedding against multiplication by complex units."""

import pytest
import torch

from moe_train.ops.rotary import apply_rotary, rotary_angles


def rotate(x, positions, theta=10000.0):
    return apply_rotary(x, *rotary_angles(positions, x.shape[-1], theta))


@pytest.mark.parametrize("theta", [100.0, 1e6])
def test_is_multiplication_by_a_complex_unit(theta):
    batch, heads, length, size = 2, 3, 5, 8
    x = torch.randn(batch, heads, length, size, dtype=torch.float64)
    positions = torch.randint(0, 5000, (batch, length))
    y = rotate(x, positions, theta)
    for b in range(batch):
        for s in range(length):
            for i in range(size // 2):
                angle = positions[b, s].double() * theta ** (-2 * i / size)
                unit = torch.polar(torch.tensor(1.0, dtype=torch.float64), angle)
                for h in range(heads):
                    expected = torch.complex(x[b, h, s, i], x[b, h, s, i + size // 2]) * unit
                    # Cosine and sine are kept in fp32: 6e-8 of the two coordinates, each of order 1.
                    assert abs(y[b, h, s, i] - expected.real) < 5e-7
                    assert abs(y[b, h, s, i + size // 2] - expected.imag) < 5e-7


def test_scores_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=generator)

    def score(i, j):
        return (rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum()

    for i, j, shift in [(3, 1, 4000), (100, 7, 1), (0, 0, 12345), (5, 900, 31)]:
        # fp32 cosines: 16 products with errors of 1e-7.
        assert abs(score(i, j) - score(i + shift, j + shift)) < 1e-5
    assert abs(score(3, 1) - score(4, 1)) > 1e-3


def test_position_zero_changes_nothing_and_lengths_stay():
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(rotate(x, torch.zeros(1, 4, dtype=torch.int64)), x)
    # One rotation and one root of eight squares in fp32.
    torch.testing.assert_close(rotate(x, torch.arange(4)[None] * 997).norm(dim=-1), x.norm(dim=-1), rtol=2e-6, atol=0)


def test_one_row_of_positions_serves_the_batch():
    x = torch.randn(3, 2, 5, 8)
    positions = torch.arange(5)
    assert torch.equal(rotate(x, positions[None]), rotate(x, positions.expand(3, 5)))


def test_bf16_is_rotated_in_fp32():
    """In bf16 the positions 4001 and 4002 are one number: what is rounded is the result alone."""
    x = torch.randn(1, 1, 2, 8).bfloat16()
    positions = torch.tensor([[4001, 4002]])
    y = rotate(x, positions)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), positions).bfloat16())
    cos, sin = rotary_angles(positions, 8, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos[0, 0, 0, 0] - cos[0, 0, 1, 0]).abs() > 0.01


def test_gradient():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, torch.tensor([[0, 5, 9]])), (x,))
