"""Experts' SwiGLUs over grouped rows against one expert after the other in fp64."""

import pytest
import torch
import torch.nn.functional as F

from moe_train.ops.grouped_mlp import grouped_matmul, grouped_matmul_loop, grouped_swiglu, swiglu

COUNTS = {
    "all used": [3, 1, 4, 2],
    "empty in the middle": [3, 0, 5, 0],
    "empty first": [0, 0, 2, 1],
    "all on one": [0, 9, 0, 0],
    "no rows": [0, 0, 0, 0],
}
# Products of the test's sizes (up to 16 terms of order 1): a few units in the last place of the dtype; bf16 rounds the
# hidden rows to 8 bits as well.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def slow_swiglu(rows, gate_up, down, counts):
    """Row by row: w_down(silu(x w_gate) * (x w_up)) of its expert."""
    width = down.shape[1]
    outputs, place = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            hidden = rows[place] @ gate_up[expert]
            gate, up = hidden[:width], hidden[width:]
            outputs.append((gate / (1 + torch.exp(-gate)) * up) @ down[expert])
            place += 1
    return torch.stack(outputs) if outputs else rows.new_zeros(0, down.shape[2]) + 0 * rows.sum() + 0 * gate_up.sum()


def inputs(counts, dtype, hidden=8, inner=16):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).div(shape[-2] ** 0.5).to(dtype)

    rows = torch.randn(sum(counts), hidden, generator=generator, dtype=torch.float64).to(dtype)
    tensors = (rows, draw(len(counts), hidden, 2 * inner), draw(len(counts), inner, hidden))
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("sizes", [(8, 16), (6, 5)], ids=["aligned", "not aligned"])
def test_output_and_gradients_equal_the_loop(dtype, counts, sizes):
    fast = inputs(counts, dtype, *sizes)
    slow = [t.detach().double().requires_grad_() for t in fast]
    y = grouped_swiglu(*fast, torch.tensor(counts))
    expected = slow_swiglu(*slow, counts)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(y, fast, upstream)
    expected_grads = torch.autograd.grad(expected, slow, upstream.double(), allow_unused=True, materialize_grads=True)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(y.double(), expected, **close)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, **close)
    for expert, count in enumerate(counts):
        if count == 0:
            assert not grads[1][expert].any()
            assert not grads[2][expert].any()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 8)], ids=str)
def test_whole_16_bytes_take_one_grouped_product(dtype, width, monkeypatch):
    """The loop reads the offsets on the host, and is only for what F.grouped_mm refuses."""
    calls = []
    original = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **named: calls.append(1) or original(*args, **named))
    rows, weight = torch.randn(5, width).to(dtype), torch.randn(2, width, 2 * width).to(dtype)
    offsets = torch.tensor([2, 5], dtype=torch.int32)
    y = grouped_matmul(rows, weight, offsets)
    assert calls == [1]
    # One product of `width` terms, rounded once to the dtype.
    torch.testing.assert_close(y, grouped_matmul_loop(rows, weight, offsets), rtol=1e-2, atol=1e-2)


def test_gradcheck():
    rows, gate_up, down = inputs([2, 0, 1], torch.float64, 3, 2)
    counts = torch.tensor([2, 0, 1])
    assert torch.autograd.gradcheck(lambda *t: grouped_swiglu(*t, counts), (rows, gate_up, down))


def test_swiglu_gates_with_the_first_half():
    x = torch.tensor([[0.0, 2.0, 5.0, 7.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 2 / (1 + torch.exp(torch.tensor(-2.0, dtype=torch.float64))) * 7]])
    torch.testing.assert_close(swiglu(x), expected.double(), rtol=0, atol=1e-15)
