"""The small modules."""

import pytest
import torch

from moe_train.model.layers import Embedding, LayerNorm, Linear, RMSNorm, SwiGLU, WideLinear, make_norm
from moe_train.model.parameters import Constant, Normal


def test_linear_has_no_bias_and_says_how_it_begins():
    linear = Linear(3, 5, 0.1)
    assert [name for name, _ in linear.named_parameters()] == ["weight"]
    assert linear.initial_values() == {"weight": Normal(0.1)}
    assert Linear(3, 5, 0.0).initial_values() == {"weight": Constant(0.0)}
    assert Embedding(7, 3, 0.1).initial_values() == {"weight": Normal(0.1)}
    assert RMSNorm(3, 1e-5).initial_values() == {"weight": Constant(1.0)}
    assert LayerNorm(3, 1e-5).initial_values() == {"weight": Constant(1.0), "bias": Constant(0.0)}


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_wide_linear_is_at_least_fp32(dtype, wide):
    linear = WideLinear(64, 4, 0.1)
    linear.weight.data = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = linear(x)
    assert y.dtype == wide
    # 64 products of order 1, in fp32; bf16 would be off by 1e-2.
    torch.testing.assert_close(y.double(), x.double() @ linear.weight.double().T, rtol=0, atol=2e-5)


def test_norms_by_name():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    rms, layer = make_norm("rmsnorm", 8, 1e-2).double(), make_norm("layernorm", 8, 1e-2).double()
    rms.weight.data.fill_(2)
    layer.weight.data.fill_(3)
    layer.bias.data.fill_(0.5)
    centred = x - x.mean(-1, keepdim=True)
    # fp64
    torch.testing.assert_close(rms(x), 2 * x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt(), rtol=0, atol=1e-12)
    expected = 3 * centred / (centred.square().mean(-1, keepdim=True) + 1e-2).sqrt() + 0.5
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_dense_swiglu():
    dense = SwiGLU(4, 6, 0.1, 0.1).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    gate, up = x @ dense.gate_up.weight[:6].T, x @ dense.gate_up.weight[6:].T
    expected = (gate / (1 + torch.exp(-gate)) * up) @ dense.down.weight.T
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=1e-13)  # fp64
