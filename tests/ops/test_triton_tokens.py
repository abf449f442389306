"""Kernels of rotation, cross-entropy and choice against PyTorch's operations: in Triton's interpreter, and on a GPU."""

import pytest
import torch

from moe_train.model.moe.routers.base import choose_experts
from moe_train.ops import kernels
from moe_train.ops.cross_entropy import IGNORED_TARGET, summed_cross_entropy, token_cross_entropy
from moe_train.ops.rotary import apply_rotary, rotary_angles
from tests.ops.test_triton_kernels import assert_rounded_once, draw, dtypes, no_kernels, only_kernels
from tests.ops.triton_process import needs_triton

pytestmark = needs_triton
# Batch, heads, sequence, head size: one head, more heads than a program takes, a half that is no power of two.
SHAPES = {"one": (1, 1, 3, 2), "many heads": (2, 80, 4, 64), "odd half": (2, 3, 5, 12)}
WIDTHS = (1, 7, 5000)  # of a vocabulary: one word, a part of a block, more than one
EXPERTS = (1, 8, 60)


def check_rotary(device: str, dtype: torch.dtype, shape: tuple[int, ...], of_rows: bool) -> None:
    batch, heads, length, size = shape
    positions = torch.arange(length, device=device).expand(batch if of_rows else 1, -1) * 1000
    cos, sin = rotary_angles(positions, size, 1e4)
    x = draw((batch, length, heads, size), dtype, device, 1).transpose(1, 2).requires_grad_()  # as projections give it
    upstream = draw(shape, dtype, device, 2)
    exact = x.detach().double().requires_grad_()
    with no_kernels():
        expected = apply_rotary(exact, cos.double(), sin.double())
    expected.backward(upstream.double())
    with only_kernels(device):
        found = apply_rotary(x, cos, sin)
        assert type(found.grad_fn).__name__ == "_RotationBackward"
        found.backward(upstream)
    assert found.dtype == dtype and found.stride() == x.stride()
    assert_rounded_once(found.detach(), expected.detach())
    assert_rounded_once(x.grad, exact.grad)


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rotary(run, dtype, shape):
    run(check_rotary, dtype, shape, False)


def test_rotary_with_positions_of_each_row(run):
    run(check_rotary, torch.bfloat16, SHAPES["odd half"], True)


def check_losses(device: str, dtype: torch.dtype, width: int) -> None:
    logits = (4 * draw((6, width), dtype, device, 3)).requires_grad_()
    targets = torch.tensor([0, width - 1, IGNORED_TARGET, width // 2, 0, 0], device=device)
    with torch.no_grad():
        logits[4, 0] = 60.0  # certain
    upstream = torch.tensor([1.0, 0.5, 3.0, 1 / 3, 1.0, 0.0], device=device)
    exact = logits.detach().double().requires_grad_()
    with no_kernels():
        expected = token_cross_entropy(exact, targets)
        expected.backward(upstream.double())
    with only_kernels(device):
        assert kernels.token_kernels_for(logits) is not None
        found = token_cross_entropy(logits, targets)
        found.backward(upstream)
    assert found.dtype == torch.float32 and found[2] == 0 and not logits.grad[2].any()
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)  # fp32 sums of up to 5,000 terms
    # Two roundings to the dtype: of the slope, and of its product with the gradient of the loss.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2.1 * eps + 3e-5, atol=2 * eps * eps + 1e-6)


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_cross_entropy(run, dtype, width):
    run(check_losses, dtype, width)


def check_chunks(device: str, dtype: torch.dtype) -> None:
    x, weight = draw((9, 16), dtype, device, 4).requires_grad_(), draw((70, 16), dtype, device, 5).requires_grad_()
    targets = torch.tensor([3, 69, 0, IGNORED_TARGET, 5, 5, 9, 11, 68], device=device)
    found = []
    for kernels_or_none in (only_kernels(device), no_kernels()):
        x.grad = weight.grad = None
        with kernels_or_none:
            total, losses = summed_cross_entropy(x, weight, targets, 4)
            total.backward()
        found.append((total.detach(), losses, x.grad, weight.grad))
    eps = torch.finfo(dtype).eps
    for ours, reference in zip(*found, strict=True):
        # Slopes may round differently by a unit, of a number up to 1, and 9 of them are added.
        torch.testing.assert_close(ours, reference, rtol=2 * eps + 1e-5, atol=9 * eps + 1e-5)


@dtypes
def test_a_slope_takes_the_memory_of_its_chunk_of_logits(run, dtype):
    run(check_chunks, dtype)


def check_choice(device: str, num_experts: int) -> None:
    keys = torch.randint(-(2**62), 2**62, (50,), generator=torch.Generator().manual_seed(6)).to(device)
    scores = draw((50, num_experts), torch.float32, device, 7)
    scores[:10] = 0.0  # an untrained router: the draw decides
    scores[10:20] = scores[10:20].sign() * 0.0  # zeros of both signs are equal
    scores[20:30] = scores[20:30].round()  # a few equal scores, of both signs
    for top_k in {1, min(2, num_experts), min(8, num_experts)}:
        with no_kernels():
            expected = choose_experts(scores, keys, top_k)
        with only_kernels(device):
            assert kernels.token_kernels_for(scores) is not None
            found = choose_experts(scores, keys, top_k)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_choice_of_experts_is_the_same_to_the_last_draw(run, num_experts):
    run(check_choice, num_experts)


def check_empty(device: str) -> None:
    with only_kernels(device):
        rotated = apply_rotary(torch.zeros(2, 3, 0, 8, device=device), *rotary_angles(torch.zeros(1, 0), 8, 1e4))
        chosen = choose_experts(torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device), 2)
        losses = token_cross_entropy(torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    assert rotated.shape == (2, 3, 0, 8) and chosen.shape == (0, 2) and losses.shape == (0,)


def test_without_tokens(run):
    run(check_empty)


def test_compiled_code_has_the_compilers_own_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "can_run", lambda tensor: True)
    assert kernels.token_kernels_for(torch.zeros(1)) is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.token_kernels_for(torch.zeros(1)) is None
