"""Copies of rows: spread and summed, against loops; gradients against finite differences."""

import pytest
import torch

from moe_train.ops.row_map import RowMap, gather_rows, scatter_add_rows

SOURCES = {
    "some never": ([3, 0, 0, 4, 3, 3], 6),
    "each once": ([2, 0, 1], 3),
    "all of one": ([1, 1, 1, 1], 2),
    "no place": ([], 3),
    "no source": ([], 0),
}
sources = pytest.mark.parametrize(("source", "count"), SOURCES.values(), ids=SOURCES.keys())


def map_of(source, count):
    return RowMap.of(torch.tensor(source, dtype=torch.int64), count)


@sources
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_loops(source, count, dtype):
    row_map = map_of(source, count)
    assert row_map.num_sources == count
    rows = torch.randn(count, 5).to(dtype)
    places = torch.randn(len(source), 5).to(dtype)
    for place, number in enumerate(source):
        assert torch.equal(gather_rows(rows, row_map)[place], rows[number])
    summed = scatter_add_rows(places, row_map)
    assert summed.shape == (count, 5) and summed.dtype == dtype
    for number in range(count):
        of_it = [places[place].double() for place in range(len(source)) if source[place] == number]
        expected = sum(of_it, torch.zeros(5, dtype=torch.float64))
        # Three terms of order 1, rounded once to the dtype.
        torch.testing.assert_close(summed[number].double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@sources
def test_gradients(source, count):
    row_map = map_of(source, count)
    rows = torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    places = torch.randn(len(source), 3, dtype=torch.float64, requires_grad=True)
    if count:
        assert torch.autograd.gradcheck(lambda rows: gather_rows(rows, row_map), (rows,))
        assert torch.autograd.gradcheck(lambda places: scatter_add_rows(places, row_map), (places,))
    scatter_add_rows(places, row_map).sum().backward()  # whose gradient is expanded
    gather_rows(rows, row_map).sum().backward()
    assert rows.grad.shape == rows.shape and places.grad.shape == places.shape


def test_an_order_of_copies_is_the_same_map():
    generator = torch.Generator().manual_seed(0)
    for copies in (1, 3):
        order = torch.randperm(4 * copies, generator=generator)
        made, expected = RowMap.of_order(order, copies), RowMap.of(order // copies, 4)
        assert torch.equal(made.source_R, expected.source_R) and torch.equal(made.offsets_N, expected.offsets_N)
        for rows in (made.places_R, expected.places_R):
            assert torch.equal(order[rows] // copies, torch.arange(4).repeat_interleave(copies))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 0), (2, 7)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_table_is_the_map_of_its_true_elements(shape, share):
    table = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    columns = table.nonzero()[:, 1]
    made, expected = RowMap.of_table(table, len(columns)), RowMap.of(columns, shape[1])
    assert made.num_sources == shape[1]
    for name in ("source_R", "places_R", "offsets_N"):
        assert torch.equal(getattr(made, name), getattr(expected, name))


@pytest.mark.parametrize("width", [1, 8, 64])
def test_bf16_rows_are_added_in_fp32(width):
    rows = torch.full((256, width), 2.0**-8 + 2.0**-12, dtype=torch.bfloat16)
    # Each row is exact in bf16, but a running sum of 8 bits would stop growing at 1.
    assert (scatter_add_rows(rows, map_of([0] * 256, 1)) == 1.0625).all()
