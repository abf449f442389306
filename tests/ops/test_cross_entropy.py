"""Cross-entropy of each token against its formula in fp64, ignored targets and chunks included."""

import math

import pytest
import torch

from moe_train.ops import cross_entropy
from moe_train.ops.cross_entropy import IGNORED_TARGET, mean_cross_entropy, token_cross_entropy

TOKENS, VOCAB = 9, 13


def inputs(dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[[2, 7]] = IGNORED_TARGET
    return logits.requires_grad_(), targets


def slow(logits, targets):
    rows = []
    for row, target in zip(logits, targets.tolist(), strict=True):
        rows.append(torch.log(torch.exp(row).sum()) - row[target] if target != IGNORED_TARGET else 0 * row.sum())
    return torch.stack(rows)


@pytest.fixture(params=[1, 4, 1000], ids=lambda rows: f"{rows} rows at once")
def chunks(request, monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", request.param * VOCAB * 8)


def test_losses_and_gradients_equal_the_formula(chunks):
    logits, targets = inputs()
    losses, expected = token_cross_entropy(logits, targets), slow(logits, targets)
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    # fp64, thirteen terms.
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-13)
    grads = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (losses, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-13)
    assert not grads[0][[2, 7]].any()
    assert losses[[2, 7]].tolist() == [0, 0]


def test_gradcheck(chunks):
    logits, targets = inputs()
    assert torch.autograd.gradcheck(lambda x: token_cross_entropy(x, targets), (logits,))
    assert torch.autograd.gradcheck(lambda x: mean_cross_entropy(x, targets), (logits,))


def test_mean_is_over_the_targets_that_count():
    logits, targets = inputs()
    expected = slow(logits, targets).sum() / (TOKENS - 2)
    assert mean_cross_entropy(logits, targets).item() == pytest.approx(expected.item(), rel=1e-13)
    uniform = mean_cross_entropy(torch.zeros(4, 50), torch.tensor([1, 2, IGNORED_TARGET, 0]))
    assert uniform.item() == pytest.approx(math.log(50), rel=1e-6)  # fp32


def test_no_target_that_counts_gives_zero_without_gradient():
    logits, _ = inputs()
    loss = mean_cross_entropy(logits, torch.full((TOKENS,), IGNORED_TARGET))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_logits_are_computed_in_fp32(dtype):
    logits, targets = inputs(dtype)
    losses = token_cross_entropy(logits, targets)
    assert losses.dtype == torch.float32
    expected = slow(logits.detach().double(), targets)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)  # fp32
    (grad,) = torch.autograd.grad(losses, logits, torch.full((TOKENS,), 0.5))
    wide = logits.detach().double().requires_grad_()
    (expected_grad,) = torch.autograd.grad(slow(wide, targets), wide, torch.full((TOKENS,), 0.5).double())
    assert grad.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-6)  # the gradient is rounded to the dtype, once; fp32 by its own arithmetic
    torch.testing.assert_close(grad.double(), expected_grad, rtol=eps, atol=eps / 16)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    losses = token_cross_entropy(logits, torch.tensor([1, 2]))
    assert losses.tolist() == pytest.approx([1e4, math.log(3)], rel=1e-3)  # fp32 beside 1e4 keeps three digits of log 3
    losses.sum().backward()
    assert logits.grad.isfinite().all()


def test_logits_and_targets_are_left_as_they_are(chunks):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, targets = inputs(dtype)
        before, before_targets = logits.detach().clone(), targets.clone()
        token_cross_entropy(logits, targets)
        with torch.no_grad():
            token_cross_entropy(logits, targets)
        assert torch.equal(logits.detach(), before)
        assert torch.equal(targets, before_targets)
