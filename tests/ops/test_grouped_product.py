"""Products of all experts against one expert after the other, for every GPU's way of computing them."""

import pytest
import torch
import torch.nn.functional as F

from moe_train.ops import grouped_product
from moe_train.ops.grouped_product import ExpertRows, rows_product, weights_product

COUNTS = {"all used": [3, 1, 4], "some empty": [0, 5, 0], "one row": [0, 0, 1], "none": [0, 0, 0]}
WIDTH, OUTPUT = 8, 16


def rows_of(counts, way):
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    return ExpertRows(offsets, tuple(counts) if way == "in turn" else None, clears_empty=way == "clearing")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("way", ["in turn", "kernel", "clearing"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_products_equal_the_loop(counts, way):
    x, y, weight = draw(sum(counts), WIDTH), draw(sum(counts), OUTPUT), draw(3, WIDTH, OUTPUT)
    rows = rows_of(counts, way)
    parts = list(zip(x.split(counts), y.split(counts), weight))
    expected = torch.cat([x_r @ weight_e for x_r, _, weight_e in parts])
    # Sums of at most 8 products in fp32.
    torch.testing.assert_close(rows_product(x, weight, rows), expected, rtol=1e-5, atol=1e-5)
    expected = torch.stack([x_r.t() @ y_r for x_r, y_r, _ in parts])
    torch.testing.assert_close(weights_product(x, y, rows), expected, rtol=1e-5, atol=1e-5)


def test_rows_without_an_expert_are_passed_over():
    x, y, weight = draw(9, WIDTH), draw(9, OUTPUT), draw(3, WIDTH, OUTPUT)
    rows = rows_of([2, 0, 3], "in turn")
    torch.testing.assert_close(rows_product(x, weight, rows)[:2], x[:2] @ weight[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights_product(x, y, rows)[2], x[2:5].t() @ y[2:5], rtol=1e-5, atol=1e-5)


def test_garbage_of_an_empty_expert_is_cleared(monkeypatch):
    """As Blackwell's kernel leaves it (pytorch#172439): NaN where the expert has no rows."""
    real = F.grouped_mm

    def leaves_garbage(a, b, *, offs):
        out = real(a, b, offs=offs)
        out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", leaves_garbage)
    x, y = draw(5, WIDTH), draw(5, OUTPUT)
    assert weights_product(x, y, rows_of([0, 5, 0], "kernel")).isnan().any()
    cleared = weights_product(x, y, rows_of([0, 5, 0], "clearing"))
    assert not cleared[0].any() and not cleared[2].any()
    torch.testing.assert_close(cleared[1], x.t() @ y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["in turn", "kernel", "clearing"])
def test_without_rows_the_kernel_is_not_called(monkeypatch, way):
    """CUDA's would get a null pointer (Megatron-LM#4851)."""
    monkeypatch.setattr(F, "grouped_mm", None)
    rows = rows_of([0, 0, 0], way)
    x, y = draw(0, WIDTH), draw(0, OUTPUT)
    assert rows_product(x, draw(3, WIDTH, OUTPUT), rows).shape == (0, OUTPUT)
    assert not weights_product(x, y, rows).any()


@pytest.mark.parametrize(
    ("capability", "dtype", "reads", "clears"),
    [
        ((8, 0), torch.bfloat16, True, False),
        ((9, 0), torch.bfloat16, False, False),
        ((9, 0), torch.float16, True, False),
        ((10, 0), torch.bfloat16, False, True),
        ((12, 0), torch.bfloat16, True, False),
    ],
    ids=str,
)
def test_the_gpu_decides_who_needs_the_counts(monkeypatch, capability, dtype, reads, clears):
    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    counts = torch.tensor([2, 0, 1]).as_subclass(OnCuda)
    found = grouped_product.ExpertRows.of(counts, dtype)
    assert found.counts == ((2, 0, 1) if reads else None)
    assert found.clears_empty == clears
