"""The state of RWKV-7 in chunks against its loop over tokens."""

import pytest
import torch

from moe_train.model.mixers.rwkv7 import _advance as advance_layer
from moe_train.ops.rwkv7 import CHUNK, DeltaInputs, advance
from tests.model.mixers import slow

HEADS, SIZE = 2, 4


def inputs_of(length: int, dtype: torch.dtype = torch.float64) -> DeltaInputs:
    generator = torch.Generator().manual_seed(length)
    r, k, v, a = (torch.randn(2, length, HEADS, SIZE, dtype=dtype, generator=generator) for _ in range(4))
    # Decays from the smallest that a layer can give to nearly 1.
    log_decay = -0.6065 * torch.rand(2, length, HEADS, SIZE, dtype=dtype, generator=generator)
    unit = torch.nn.functional.normalize(a, dim=-1)
    return DeltaInputs(r, log_decay, k, v, -unit, unit * torch.rand(a.shape, dtype=dtype, generator=generator))


def by_loop(inputs: DeltaInputs, begins: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in range(len(begins)):
        starts = sorted({0, *begins[row].nonzero().flatten().tolist()})
        spans = [slice(start, end) for start, end in zip(starts, [*starts[1:], begins.shape[1]], strict=True)]
        heads = [
            torch.cat(
                [
                    slow.rwkv7_state(
                        *(
                            each[row, span, head]
                            for each in (inputs.r, inputs.log_decay.exp(), inputs.k, inputs.v, inputs.a, inputs.b)
                        )
                    )
                    for span in spans
                ]
            )
            for head in range(HEADS)
        ]
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 7])
def test_outputs_and_gradients_are_those_of_the_loop(length):
    inputs = inputs_of(length)
    leaves = [each.requires_grad_() for each in vars(inputs).values()]
    begins = torch.zeros(2, length, dtype=torch.bool)
    begins[:, 0] = True
    begins[0, length // 3] = begins[0, length // 2] = begins[1, length - 1] = True
    y, _ = advance(inputs, torch.zeros(2, HEADS, SIZE, SIZE, dtype=torch.float64), begins)
    expected = by_loop(inputs, begins)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for found, known in zip(
        torch.autograd.grad((y * upstream).sum(), leaves),
        torch.autograd.grad((expected * upstream).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, known, rtol=0, atol=1e-11)


def span_of(inputs: DeltaInputs, columns: slice, rows: slice = slice(None)) -> DeltaInputs:
    return DeltaInputs(*(each[rows, columns] for each in vars(inputs).values()))


@pytest.mark.parametrize("length", [1, 5, CHUNK, 2 * CHUNK + 7])
def test_it_goes_on_from_a_state(length):
    """From a state of several chunks, over chunks that a document begins in, and over none."""
    start = CHUNK + 5
    inputs = inputs_of(start + length)
    leaves = [each.requires_grad_() for each in vars(inputs).values()]
    begins = torch.zeros(2, start + length, dtype=torch.bool)
    begins[1, start + length // 2] = True  # the first row goes on to the end
    empty = torch.zeros(2, HEADS, SIZE, SIZE, dtype=torch.float64)
    _, state = advance(span_of(inputs, slice(start)), empty, begins[:, :start])
    y, _ = advance(span_of(inputs, slice(start, None)), state, begins[:, start:])
    expected = by_loop(inputs, begins)[:, start:]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, known = (torch.autograd.grad((each * upstream).sum(), leaves) for each in (y, expected))
    for ours, theirs in zip(found, known, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("counts", [(0, 1), (CHUNK, CHUNK + 1), (7, 2 * CHUNK + 2)])
def test_tokens_that_are_not_valid_change_no_state(counts):
    """As the layer masks them: its state keeps the first tokens of each row only."""
    start, length = CHUNK + 3, 2 * CHUNK + 2
    inputs = inputs_of(start + length)
    begins = torch.zeros(2, start + length, dtype=torch.bool)
    begins[1, start + CHUNK] = True  # which is not valid with the first counts
    empty = torch.zeros(2, HEADS, SIZE, SIZE, dtype=torch.float64)
    _, before = advance(span_of(inputs, slice(start)), empty, begins[:, :start])
    rest = vars(span_of(inputs, slice(start, None))) | {"begins": begins[:, start:]}
    valid = torch.arange(length) < torch.tensor(counts)[:, None]
    after, _ = advance_layer({"state": before}, rest, valid)
    for row, count in enumerate(counts):
        kept = slice(start + count)
        own_begins = begins[row : row + 1, kept]
        _, expected = advance(span_of(inputs, kept, slice(row, row + 1)), empty[:1], own_begins)
        torch.testing.assert_close(after["state"][row : row + 1], expected, rtol=0, atol=1e-12)


def test_the_strongest_decay_is_finite_and_close_in_fp32():
    length = 3 * CHUNK
    wide = inputs_of(length)
    wide = DeltaInputs(wide.r, torch.full_like(wide.log_decay, -0.6065), wide.k, wide.v, wide.a, wide.b)
    narrow = DeltaInputs(*(each.float().requires_grad_() for each in vars(wide).values()))
    begins = torch.zeros(2, length, dtype=torch.bool)
    y, _ = advance(narrow, torch.zeros(2, HEADS, SIZE, SIZE), begins)
    expected, _ = advance(wide, torch.zeros(2, HEADS, SIZE, SIZE, dtype=torch.float64), begins)
    # Logarithms of decays up to 19 in fp32: 2e-6 of terms of order 10.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)
    y.sum().backward()
    assert all(each.grad.isfinite().all() for each in vars(narrow).values())
