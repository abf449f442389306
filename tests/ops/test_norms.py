"""Norms against their formulas in fp64."""

import pytest
import torch

from moe_train.ops.norms import layer_norm, rms_norm

EPSILON = 1e-3  # large enough to be seen


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def slow_rms(x, weight):
    return x / ((x**2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def slow_layer(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight + bias


def test_formulas_and_gradients_in_fp64():
    x, weight, bias = (draw(2, 3, 5) * 0.1).requires_grad_(), draw(5).requires_grad_(), (draw(5) + 1).requires_grad_()
    # fp64, five terms.
    torch.testing.assert_close(rms_norm(x, weight, EPSILON), slow_rms(x, weight), rtol=0, atol=1e-13)
    torch.testing.assert_close(layer_norm(x, weight, bias, EPSILON), slow_layer(x, weight, bias), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPSILON), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, EPSILON), (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_accumulate_in_fp32(dtype):
    """The result is the fp64 result rounded once; sums of 4096 terms in bf16 would be wrong in the second digit."""
    x = (draw(4, 4096) + 3).to(dtype)
    weight, bias = draw(4096).to(dtype), draw(4096).to(dtype)
    half_unit = torch.finfo(dtype).eps  # of 1; the fp32 arithmetic may turn a tie the other way
    for fast, slow in (
        (rms_norm(x, weight, EPSILON), slow_rms(x.double(), weight.double())),
        (layer_norm(x, weight, bias, EPSILON), slow_layer(x.double(), weight.double(), bias.double())),
    ):
        assert fast.dtype == dtype
        torch.testing.assert_close(fast.double(), slow, rtol=half_unit / 2 * 1.01, atol=1e-5)


def test_fp16_squares_do_not_overflow():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300^2 is beyond fp16
    assert rms_norm(x, torch.ones(4, dtype=torch.float16), EPSILON).tolist() == [[1.0] * 4]
