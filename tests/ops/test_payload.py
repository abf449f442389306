"""Rows in fewer bits, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.ops.payload import Payload


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["model", "bf16", "fp8"])
def test_shapes_bytes_and_errors(name, dtype):
    rows = (torch.randn(50, 33, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    rows[3] = 0
    payload = Payload(name)
    sent = payload.encode(rows)
    row_bytes = {"model": 33 * rows.element_size(), "bf16": 66, "fp8": 37}[name]
    assert sent.shape[0] == 50 and sent[0].numel() * sent.element_size() == row_bytes
    back = payload.decode(sent, dtype)
    assert back.dtype == dtype and torch.equal(back[3], rows[3])
    if name == "model":
        assert torch.equal(back, rows)
    # Rounding to 8 and 4 bits of mantissa, and below e4m3's smallest normal number to 2**-10 of the scale of 448.
    relative, absolute = {"model": (0, 0), "bf16": (2**-8, 0), "fp8": (2**-4, 2**-10 / 448)}[name]
    bound = rows.abs() * relative + rows.abs().amax(1, keepdim=True) * absolute
    assert ((back - rows).abs() <= bound * 1.01 + (2**-8 * rows.abs() if dtype == torch.bfloat16 else 0)).all()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=20))
def test_no_row_overflows(values):
    rows = torch.tensor([values], dtype=torch.float32)
    back = Payload("fp8").decode(Payload("fp8").encode(rows), torch.float32)
    assert back.isfinite().all()
    largest = rows.abs().max()
    assert (back - rows).abs().max() <= largest * 2**-4 * 1.01 + 1e-42  # below this fp32 has no scale


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_number_stays_one(bad):
    rows = torch.ones(3, 8)
    rows[1, 5] = bad
    back = Payload("fp8").decode(Payload("fp8").encode(rows), torch.float32)
    assert not back[1].isfinite().any()
    assert torch.equal(back[0], rows[0])


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_nothing_to_send(shape):
    for name in ("model", "bf16", "fp8"):
        rows = torch.ones(shape)
        assert torch.equal(Payload(name).decode(Payload(name).encode(rows), torch.float32), rows)
