"""Cross-entropy of each token against its formula in fp64, ignored targets and chunks included."""

import math

import pytest
import torch

from moe_train.ops import cross_entropy
from moe_train.ops.cross_entropy import (
    IGNORED_TARGET,
    loss_chunk,
    mean_cross_entropy,
    summed_cross_entropy,
    token_cross_entropy,
)
from tests.ops.tensor_sizes import LargestTensor

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


def head_inputs(dtype=torch.float64, hidden=6):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(rows, hidden, generator=generator, dtype=torch.float64) for rows in (TOKENS, VOCAB))
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), inputs()[1]


@pytest.mark.parametrize("chunk", [1, 4, 9, 100])
def test_loss_by_chunks_of_tokens_equals_that_of_all_logits(chunk):
    x, weight, targets = head_inputs()
    total, losses = summed_cross_entropy(x, weight, targets, chunk)
    expected = slow(x @ weight.T, targets)
    torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=1e-13)  # fp64, thirteen terms
    assert torch.equal(total, losses.sum()) and not losses.requires_grad
    grads = [torch.autograd.grad(0.3 * loss, (x, weight)) for loss in (total, expected.sum())]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *given: summed_cross_entropy(*given, targets, chunk)[0], (x, weight))


def test_loss_by_chunks_without_some_gradients():
    x, weight, targets = head_inputs()
    expected = torch.autograd.grad(slow(x @ weight.T, targets).sum(), (x, weight))
    for place in (0, 1):
        given = [each if number == place else each.detach() for number, each in enumerate((x, weight))]
        (found,) = torch.autograd.grad(summed_cross_entropy(*given, targets, 4)[0], given[place])
        torch.testing.assert_close(found, expected[place], rtol=0, atol=1e-13)
    with torch.no_grad():
        total, _ = summed_cross_entropy(x, weight, targets, 4)
    assert total.item() == pytest.approx(slow(x @ weight.T, targets).sum().item(), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_by_chunks_in_16_bits_is_as_good_as_with_all_logits(dtype):
    """Small upstream gradients, as of a mean over many tokens, with a loss scale in fp16."""
    x, weight, targets = head_inputs(dtype)
    wide = [each.detach().double().requires_grad_() for each in (x, weight)]
    exact = torch.autograd.grad(slow(wide[0] @ wide[1].T, targets).sum(), wide)
    scale = 1 / 3000
    total, losses = summed_cross_entropy(x, weight, targets, 4)
    assert losses.dtype == torch.float32
    found = torch.autograd.grad(total * scale, (x, weight))
    whole = torch.autograd.grad(token_cross_entropy(x @ weight.T, targets).sum() * scale, (x, weight))
    for mine, all_at_once, theirs in zip(found, whole, exact, strict=True):
        assert mine.dtype == dtype
        error, bound = (mine.double() - scale * theirs).norm(), (all_at_once.double() - scale * theirs).norm()
        assert error < 1.5 * bound + 1e-3 * scale


def test_logits_are_cut_only_where_that_saves_memory():
    # Qwen3-30B: 152k x 2048 in bf16.
    assert loss_chunk(512, 151_936, 2048, 2, None) == 512  # 148 MiB
    assert loss_chunk(4096, 151_936, 2048, 2, None) == 768  # 223 of 1187 MiB
    assert loss_chunk(2048, 151_936, 4096, 2, None) == 2048  # the sum of the gradient takes as much as it saves
    assert loss_chunk(1 << 20, 257, 64, 4, None) == 261_120  # 256 MiB
    assert loss_chunk(100_000, 4_000_000, 64, 2, None) == 256  # not fewer
    assert loss_chunk(100, 50, 8, 4, 30) == 30 and loss_chunk(100, 50, 8, 4, 300) == 100


@pytest.mark.parametrize("chunk", [32, 64])
def test_no_tensor_is_as_large_as_all_logits(chunk):
    x, weight = torch.randn(512, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    targets = torch.randint(0, 1000, (512,))
    with LargestTensor() as seen:
        summed_cross_entropy(x, weight, targets, chunk)[0].backward()
    assert seen.elements == chunk * 1000
