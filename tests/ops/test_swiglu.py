"""The activation of a SwiGLU."""

import torch
import torch.nn.functional as F

from moe_train.ops.swiglu import swiglu


def test_gates_with_the_first_half():
    x = torch.tensor([[0.0, 2.0, 5.0, 7.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 2 / (1 + torch.exp(torch.tensor(-2.0, dtype=torch.float64))) * 7]])
    torch.testing.assert_close(swiglu(x), expected.double(), rtol=0, atol=1e-15)


def test_gradient():
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up, rtol=0, atol=1e-15)
