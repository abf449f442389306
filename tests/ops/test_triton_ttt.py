"""The Triton kernels of TTT against PyTorch's loop over mini-batches: in Triton's interpreter, and on a GPU."""

from unittest import mock

import pytest
import torch

from moe_train.ops import kernels, ttt
from tests.model.mixers import checks
from tests.model.small import random_ids
from tests.ops.test_triton_kernels import draw, no_kernels, only_kernels
from tests.ops.triton_process import TIMEOUT, needs_triton

pytestmark = needs_triton
HEADS = 2
NAMES = ("outputs", "q", "k", "target", "rates", "rows", "start", "norm weight", "norm bias", "last row")
# Of every row, whether a mini-batch begins a document, and whether it has its last token.
MARKS = {
    "one document, open at its end": ([[1, 0, 0]], [[1, 1, 0]]),
    "documents that begin inside": ([[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]], [[1, 0, 0, 1, 1], [0, 1, 1, 1, 0]]),
    "one mini-batch": ([[1]], [[0]]),
}


def leaves_of(begins_Bn: torch.Tensor, size: int, width: int) -> list[torch.Tensor]:
    tokens = (*begins_Bn.shape, HEADS, size, width)
    shapes = [tokens, tokens, tokens, tokens[:-1], (*begins_Bn.shape, 1, size), (1, HEADS, width + 1, width)]
    shapes += [(HEADS, 1, width), (HEADS, 1, width), ()]
    drawn = [draw(shape, torch.float64, "cpu", seed) for seed, shape in enumerate(shapes)]
    q, k, target, rates, rows, start, weight, bias, last_row = drawn
    rates = rates.sigmoid() * 0.3
    rates[..., size // 2 :] *= (begins_Bn[:, :, None, None] == 0) * 1.0  # empty columns
    return [q, k, target, rates, rows.sigmoid(), 0.3 * start, 1 + 0.3 * weight, 0.3 * bias, last_row.sigmoid()]


def outcome(device, dtype, leaves, begins_Bn, is_full_Bn):
    """Outputs, and the gradients of all inputs; of a single mini-batch nothing depends on the last row."""
    inputs = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
    *tokens, start, weight, bias, last_row = inputs
    norm, marks = ttt.InnerNorm(weight, bias, 1e-6), (begins_Bn.to(device), is_full_Bn.to(device))
    out, _ = ttt.scan(ttt.linear_step, (start,), ttt.MiniBatches(*tokens), norm, *marks, last_row)
    upstream = draw(out.shape, dtype, device, 99)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream, materialize_grads=True)]


def check_scan(device, begins, is_full, size, width):
    from moe_train.ops import triton_ttt  # not at the top: it imports Triton

    begins_Bn, is_full_Bn = torch.tensor(begins) == 1, torch.tensor(is_full) == 1
    case = (leaves_of(begins_Bn, size, width), begins_Bn, is_full_Bn)
    with only_kernels(device), mock.patch.object(triton_ttt, "_launch", wraps=triton_ttt._launch) as launch:
        found = outcome(device, torch.float32, *case)
        assert launch.call_count == 4  # whatever the length: one forward, three backward
        again = outcome(device, torch.float32, *case) if device == "cuda" else found
    with no_kernels():
        exact = outcome(device, torch.float64, *case)
    for name, value, second, expected in zip(NAMES, found, again, exact, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, second), name
        # fp32 over a few mini-batches; a scalar is the sum of all tokens' terms, which cancel in part.
        scale = expected.abs().max().item()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=scale * (1e-4 if value.dim() == 0 else 1e-5))


@pytest.mark.parametrize(
    ("marks", "size", "width"),
    [
        ("one document, open at its end", 16, 16),
        ("documents that begin inside", 5, 12),
        ("one mini-batch", 3, 40),
        *(pytest.param(marks, 16, 64, marks=pytest.mark.slow) for marks in MARKS),
    ],
)
def test_outputs_and_gradients_are_those_of_the_loop(run, marks, size, width):
    run(check_scan, *MARKS[marks], size, width)


def check_model(device, length, has_documents):
    """Logits and gradients of a model, whose mixers look up the kernels as on CUDA."""
    ids = random_ids(checks.BATCH, length)
    tokens = checks.index_of(ids, checks.packed_documents(length) if has_documents else None)
    found = []
    for patch in (only_kernels(device), no_kernels()):
        model = checks.make({"mixer": "ttt_linear", "ttt_linear": {"mini_batch": 5}}).float()
        with patch, mock.patch.object(ttt, "_scan_by_kernel", wraps=ttt._scan_by_kernel) as scan_by_kernel:
            logits = model(tokens).logits_BSV
            logits.square().sum().backward()
        found.append((scan_by_kernel.call_count, logits, [p.grad for p in model.parameters() if p.grad is not None]))
    (calls, logits, gradients), (without, expected, expected_gradients) = found
    assert calls > 0 and without == 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)  # fp32
    for value, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize(
    "has_documents", [pytest.param(False, marks=pytest.mark.slow), True], ids=["one document a row", "packed"]
)
def test_a_model_takes_the_kernels(interpreter, has_documents):
    interpreter.apply_async(check_model, ("cpu", 13, has_documents)).get(TIMEOUT)


def check_choice(device):
    def takes(size, width, dtype=torch.float32):
        with only_kernels(device):
            return kernels.linear_scan_kernels_for(torch.zeros(1, 1, 1, size, width, dtype=dtype, device=device))

    assert takes(16, 64) and takes(1, 1)
    assert not takes(17, 64) and not takes(16, 65)
    assert not takes(16, 64, torch.float64) and not takes(16, 64, torch.bfloat16)
    with no_kernels():
        assert kernels.linear_scan_kernels_for(torch.zeros(1, 1, 1, 1, 1)) is None


def test_they_are_for_fp32_within_their_limits(run):
    run(check_choice)
