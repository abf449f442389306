"""Products of bf16 numbers in fp32 against those in fp64, and the choice between them."""

import pytest
import torch

from moe_train.ops import products
from moe_train.ops.products import compiles_by_shape, linear, mm, widened, widens

ROUNDING = 2.0**-8  # of bf16, relative to the largest sum of absolute products


@pytest.fixture(params=[True, False], ids=["bf16 is faster", "bf16 is slower"])
def is_faster(request, monkeypatch):
    monkeypatch.setattr(products, "_multiplies_bf16_faster", lambda: request.param)
    return request.param


def draw(*shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("sizes", [(5, 3, 7), (64, 96, 32), (1, 1, 1), (0, 4, 2)], ids=str)
def test_a_product_is_rounded_once(is_faster, sizes):
    rows, inner, columns = sizes
    left, right = draw(rows, inner), draw(columns, inner).t()
    exact = left.double() @ right.double()
    out = torch.empty(rows, columns, dtype=left.dtype)
    mm(left, right, out=out)
    for found in (mm(left, right), out):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=ROUNDING, atol=1e-4)  # atol: fp32 sums near zero


def test_a_widened_factor_gives_the_product_before_rounding(is_faster):
    left, right, out = draw(6, 4), draw(4, 5), torch.empty(6, 5, dtype=torch.bfloat16)
    found = mm(widened(left), right, out=out)
    assert found.dtype == (torch.bfloat16 if is_faster else torch.float32)
    assert torch.equal(found.to(torch.bfloat16), out)


def test_an_output_that_is_a_part_of_a_tensor(is_faster):
    whole = torch.zeros(4, 6, 5, dtype=torch.bfloat16)
    mm(draw(6, 3), draw(3, 5), out=whole[2])
    assert whole[2].any() and not whole[:2].any() and not whole[3:].any()


@pytest.mark.parametrize("shape", [(6,), (2, 3), (0, 3)], ids=str)
def test_a_linear_map_and_its_gradients(is_faster, shape):
    x, weight = draw(*shape, 8).requires_grad_(), draw(5, 8).requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    found, expected = linear(x, weight), exact[0] @ exact[1].t()
    upstream = draw(*shape, 5)
    grads = torch.autograd.grad(found, (x, weight), upstream)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    for got, want in zip((found, *grads), (expected, *expected_grads), strict=True):
        assert got.dtype == torch.bfloat16 and got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=ROUNDING, atol=1e-4)


def test_a_linear_map_of_a_frozen_weight(is_faster):
    x, weight = draw(3, 8).requires_grad_(), draw(5, 8)
    linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_only_bf16_on_a_cpu_is_widened(is_faster):
    assert widens(draw(1, 1)) is not is_faster
    assert compiles_by_shape(draw(1, 1)) is is_faster
    assert compiles_by_shape(draw(1, 1, dtype=torch.float16))
    for other in (draw(1, 1, dtype=torch.float32), torch.empty(1, device="meta", dtype=torch.bfloat16)):
        assert not widens(other) and not compiles_by_shape(other)


@pytest.mark.parametrize(
    ("has_amx", "has_avx512", "vendor", "expected"),
    [
        (True, True, "GenuineIntel", True),
        (False, True, "GenuineIntel", False),
        (False, True, "AuthenticAMD", True),
        (False, False, "AuthenticAMD", False),
    ],
)
def test_which_cpus_multiply_bf16_faster(monkeypatch, tmp_path, has_amx, has_avx512, vendor, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512)
    assert products._multiplies_bf16_faster.__wrapped__() is expected
