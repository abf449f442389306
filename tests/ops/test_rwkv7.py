"""The state of RWKV-7 in chunks against its loop over tokens."""

import pytest
import torch

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
    for row in range(2):
        starts = begins[row].nonzero().flatten().tolist()
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
