"""The Triton kernels against loops in fp64 and against PyTorch's operations: in Triton's interpreter, and on a GPU."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from moe_train.ops import kernels
from moe_train.ops.routed_mlp import _fused_activation, _fused_activation_gradients, _GroupedExperts
from moe_train.ops.row_map import RowMap
from tests.ops.test_routed_mlp import COUNTS, NUM_ROWS, inputs, slow
from tests.ops.triton_process import needs_triton, triton_kernels

pytestmark = needs_triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 5, 64, 2500)  # of one column, odd, a power of two, and of more than one block
SOURCES = {
    "some never": ([3, 0, 0, 4, 3, 3], 6),
    "each once": ([2, 0, 1], 3),
    "all of one": ([1] * 20, 2),
    "no place": ([], 3),
    "no source": ([], 0),
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contextlib.contextmanager
def only_kernels(device: str) -> Iterator[None]:
    """On CPU, where the interpreter runs them, the kernels take what they take on CUDA; there nothing is changed."""
    if device == "cuda":
        yield
        return
    with mock.patch.object(kernels, "can_run", lambda tensor: tensor.dtype in kernels.DTYPES):
        yield


@contextlib.contextmanager
def no_kernels() -> Iterator[None]:
    with mock.patch.object(kernels, "can_run", lambda tensor: False):
        yield


def draw(shape, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, times: int = 1) -> None:
    """Half a unit of the dtype, and fp32 arithmetic's own error: a few units of 2^-23 of terms of order 1 to 10.

    Triton's interpreter cuts bf16 off instead of rounding it (3.7): a whole unit there.
    """
    units = 1.0 if found.dtype == torch.bfloat16 and found.device.type == "cpu" else 0.5
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=units * eps * 1.01 + 2e-6, atol=4e-6 * times)


def check_rows(device, dtype, width, source, count):
    kernel = triton_kernels()
    row_map = RowMap.of(torch.tensor(source, dtype=torch.int64, device=device), count)
    rows_ND, rows_RD = draw((count, width), dtype, device, 0), draw((len(source), width), dtype, device, 1)
    found_RD = kernel.gather_rows(rows_ND, row_map.source_R)
    summed_ND = kernel.sum_rows(rows_RD, row_map.places_R, row_map.offsets_N)
    for found, length in ((found_RD, len(source)), (summed_ND, count)):
        assert found.shape == (length, width) and found.dtype == dtype
    exact_ND = torch.zeros(count, width, dtype=torch.float64, device=device)
    for place, number in enumerate(source):
        assert torch.equal(found_RD[place], rows_ND[number])
        exact_ND[number] += rows_RD[place].double()
    assert_rounded_once(summed_ND, exact_ND)
    for number in set(range(count)) - set(source):
        assert not summed_ND[number].any()
    with only_kernels(device):
        assert kernels.kernels_for(rows_ND) is kernel
        assert torch.equal(row_map.gather(rows_ND), found_RD)
        assert torch.equal(row_map.sum_rows(rows_RD), summed_ND)  # the same bits again
    with no_kernels():
        assert torch.equal(row_map.gather(rows_ND), found_RD)
        assert_rounded_once(summed_ND, row_map.sum_rows(rows_RD.double()))


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_gathered_and_summed(run, dtype, width):
    for source, count in SOURCES.values():
        run(check_rows, dtype, width, source, count)


def check_sum_order(device):
    """2^24 + 1 + 1 in fp32, from the left, is 2^24; the ones first, it is 2^24 + 2."""
    kernel = triton_kernels()
    rows_RD = torch.tensor([[2.0**24], [1.0], [1.0]], device=device)
    offsets_N = torch.zeros(1, dtype=torch.int64, device=device)
    for places, expected in (([0, 1, 2], 2.0**24), ([1, 2, 0], 2.0**24 + 2)):
        found = kernel.sum_rows(rows_RD, torch.tensor(places, device=device), offsets_N)
        assert found.item() == expected, (places, found)
    many = torch.full((256, 3), 2.0**-8 + 2.0**-12, dtype=torch.bfloat16, device=device)
    # Each row is exact in bf16, but a running sum of 8 bits would stop growing at 1.
    assert (kernel.sum_rows(many, torch.arange(256, device=device), offsets_N) == 1.0625).all()


def test_places_are_added_in_their_order_in_fp32(run):
    run(check_sum_order)


def check_swiglu(device, dtype, width, num_rows):
    kernel = triton_kernels()
    hidden_RG, slope_RF = draw((num_rows, 2 * width), dtype, device, 3), draw((num_rows, width), dtype, device, 4)
    gates_R = draw((num_rows,), torch.float32, device, 5)
    exact = hidden_RG.double().requires_grad_(), gates_R.double().requires_grad_()
    gate_RF, up_RF = exact[0][:, :width], exact[0][:, width:]
    exact_RF = gate_RF / (1 + torch.exp(-gate_RF)) * up_RF * exact[1].unsqueeze(1)
    exact_RF.backward(slope_RF.double())
    found_RF = kernel.gated_swiglu(hidden_RG, gates_R)
    grad_hidden_RG, active_RF, grad_gates_R = kernel.gated_swiglu_gradients(hidden_RG, slope_RF, gates_R)
    assert found_RF.dtype == grad_hidden_RG.dtype == dtype and grad_gates_R.dtype == torch.float32
    assert_rounded_once(found_RF, exact_RF.detach())
    assert torch.equal(active_RF, found_RF)
    assert_rounded_once(grad_hidden_RG, exact[0].grad)
    assert_rounded_once(grad_gates_R, exact[1].grad, times=max(width // 64, 1))  # a sum of `width` terms
    with no_kernels():
        reference = (
            _fused_activation(hidden_RG, gates_R),
            *_fused_activation_gradients(hidden_RG, slope_RF.clone(), gates_R),
        )
    # PyTorch rounds three times on the way: its own error is that of the dtype, in every one of a row's terms.
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for found, expected in zip((found_RF, grad_hidden_RG, active_RF), reference, strict=False):
        torch.testing.assert_close(found, expected, **close)
    scale = 8 * width**0.5
    torch.testing.assert_close(grad_gates_R, reference[3], rtol=0, atol=scale * torch.finfo(dtype).eps)


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_swiglu_and_its_gradients(run, dtype, width):
    for num_rows in (0, 1, 5):
        run(check_swiglu, dtype, width, num_rows)


def check_extremes(device, dtype):
    """Gates so large that their exponential is beyond fp32: silu is the gate itself, or 0."""
    kernel = triton_kernels()
    largest = 1000.0
    hidden_RG = torch.tensor([[largest, 2.0], [-largest, 2.0]], dtype=dtype, device=device)
    gates_R = torch.tensor([0.5, 0.5], device=device)
    slope_RF = torch.ones(2, 1, dtype=dtype, device=device)
    grad_hidden_RG, active_RF, grad_gates_R = kernel.gated_swiglu_gradients(hidden_RG, slope_RF, gates_R)
    assert active_RF.tolist() == [[largest], [0.0]]
    assert grad_hidden_RG.tolist() == [[1.0, largest / 2], [0.0, 0.0]]
    assert grad_gates_R.tolist() == [2 * largest, 0.0]


@dtypes
def test_large_gates_give_no_nan(run, dtype):
    run(check_extremes, dtype)


def check_strides(device):
    """A sum's gradient is expanded, and a half of a row is no tensor of its own."""
    kernel = triton_kernels()
    source_R = torch.tensor([1, 0, 1], device=device)
    expanded = torch.tensor(3.0, device=device).expand(2, 7)
    assert torch.equal(kernel.gather_rows(expanded, source_R), torch.full((3, 7), 3.0, device=device))
    wide, narrow = draw((4, 12), torch.float32, device, 6), draw((4, 9), torch.float32, device, 7)
    gates_R = torch.rand(8, device=device)[::2]
    for hidden_RG in (wide[:, 1:11], wide.t().contiguous().t()[:, 1:11]):
        for slope_RF in (narrow[:, 2:7], narrow[:1, :5].expand(4, 5)):
            dense = hidden_RG.contiguous(), slope_RF.contiguous(), gates_R.contiguous()
            for found, expected in zip(
                kernel.gated_swiglu_gradients(hidden_RG, slope_RF, gates_R), kernel.gated_swiglu_gradients(*dense)
            ):
                torch.testing.assert_close(found, expected)  # on CUDA a sum's order may depend on the alignment
            assert torch.equal(kernel.gated_swiglu(hidden_RG, gates_R), kernel.gated_swiglu(dense[0], dense[2]))


def test_rows_may_lie_apart_and_columns_too(run):
    run(check_strides)


def far_rows(device, folder):
    """Three rows of 8, of which the last begins 2^31 elements after the first."""
    stride = 2**30 + 8
    if device == "cuda":
        return torch.empty(2 * stride + 8, dtype=torch.float16, device=device).as_strided((3, 8), (stride, 1))
    path = Path(folder) / "rows"
    with path.open("wb") as file:
        file.truncate(2 * (2 * stride + 8))  # a hole: only what is written takes room
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=path.stat().st_size)
    return torch.empty(0, dtype=torch.float16).set_(storage, 0, (3, 8), (stride, 1))


def check_far_rows(device, folder):
    kernel = triton_kernels()
    rows = far_rows(device, folder)
    rows.copy_(torch.arange(24).view(3, 8) / 8)
    near, gates_R = rows.contiguous(), torch.ones(3, device=device)
    order, offsets = torch.tensor([2, 0, 1], device=device), torch.tensor([0, 1, 2], device=device)
    assert torch.equal(kernel.gather_rows(rows, order), near[order])
    assert torch.equal(kernel.sum_rows(rows, order, offsets), near[order])
    assert torch.equal(kernel.gated_swiglu(rows, gates_R), kernel.gated_swiglu(near, gates_R))
    found = kernel.gated_swiglu_gradients(rows, rows[:, :4], gates_R)
    expected = kernel.gated_swiglu_gradients(near, near[:, :4].contiguous(), gates_R)
    for value, near_value in zip(found, expected):
        torch.testing.assert_close(value, near_value)  # as in check_strides


def test_addresses_pass_2_to_the_31(run, tmp_path):
    run(check_far_rows, str(tmp_path))


# Sums of up to 32 products of order 1, of which all but the kernels' own results are rounded to the dtype.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-2, torch.float16: 1e-2}


def check_together(device, dtype, counts):
    tensors, source = inputs(counts, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = slow(exact[0], exact[1], source.tolist(), counts, *exact[2:])
    upstream = draw(expected.shape, dtype, "cpu", 2)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double(), allow_unused=True, materialize_grads=True)
    rows, gates, gate_up, down = (tensor.detach().to(device).requires_grad_() for tensor in tensors)
    row_map = RowMap.of(source.to(device), NUM_ROWS)

    def outcome():
        y = _GroupedExperts.apply(rows, gates, row_map, torch.tensor(counts, device=device), gate_up, down)
        return [y, *torch.autograd.grad(y, (rows, gates, gate_up, down), upstream.to(device))]

    with only_kernels(device):
        assert kernels.kernels_for(rows, gates) is triton_kernels()
        found, again = outcome(), outcome()
    with no_kernels():
        reference = outcome()
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for values in zip(found, again, reference, [expected, *expected_grads], strict=True):
        assert values[0].dtype == values[2].dtype
        assert torch.equal(values[0], values[1])
        torch.testing.assert_close(values[0], values[2], **close)
        torch.testing.assert_close(values[0].double().cpu(), values[3], **close)
    assert not found[0][-1].any() and not found[1][-1].any()  # routed nowhere
    for expert, count in enumerate(counts):
        if count == 0:
            assert not found[3][expert].any() and not found[4][expert].any()


@dtypes
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_experts_with_the_kernels_equal_the_loop(run, dtype, counts):
    run(check_together, dtype, counts)


def test_they_are_for_cuda_and_its_dtypes_alone():
    assert not any(kernels.can_run(torch.zeros(1, dtype=dtype)) for dtype in DTYPES)
    assert kernels.kernels_for(torch.zeros(1)) is None
    device = mock.Mock(type="cuda")
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)):
        for dtype in (*DTYPES, torch.float64):
            assert kernels.can_run(mock.Mock(device=device, dtype=dtype)) == (dtype in DTYPES)
        with mock.patch.object(kernels, "_has_triton", lambda: False):
            assert not kernels.can_run(mock.Mock(device=device, dtype=torch.float32))
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: (7, 5)):
        assert not kernels.can_run(mock.Mock(device=device, dtype=torch.float32))
