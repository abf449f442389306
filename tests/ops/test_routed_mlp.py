"""Experts' SwiGLUs over routed rows against one assignment after the other in fp64, by both ways of computing them."""

import pytest
import torch

from moe_train.ops import products, routed_mlp
from moe_train.ops.routed_mlp import routed_swiglu
from moe_train.ops.row_map import RowMap

COUNTS = {
    "all used": [3, 1, 4, 2],
    "empty in the middle": [3, 0, 5, 0],
    "empty first": [0, 0, 2, 1],
    "all on one": [0, 9, 0, 0],
    "no assignment": [0, 0, 0, 0],
}
NUM_ROWS = 6
# Products of the test's sizes (up to 16 terms of order 1): a few units in the last place of the dtype; bf16 rounds the
# hidden rows to 8 bits as well.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def slow(rows, gates, source, counts, gate_up, down):
    """Assignment by assignment: gate x w_down(silu(x w_gate) * (x w_up)) of its expert, added to its row."""
    width = down.shape[1]
    output, place = list(torch.zeros_like(rows).unbind(0)), 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            hidden = rows[source[place]] @ gate_up[expert]
            gate, up = hidden[:width], hidden[width:]
            output[source[place]] = output[source[place]] + gates[place] * (
                (gate / (1 + torch.exp(-gate)) * up) @ down[expert]
            )
            place += 1
    return torch.stack(output) + 0 * (rows.sum() + gates.sum() + gate_up.sum() + down.sum())


def inputs(counts, dtype, hidden=8, inner=16):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).div(shape[-2] ** 0.5).to(dtype)

    rows = torch.randn(NUM_ROWS, hidden, generator=generator, dtype=torch.float64).to(dtype)
    gates = torch.rand(sum(counts), generator=generator, dtype=torch.float64)
    gates = gates.to(torch.promote_types(dtype, torch.float32))
    source = torch.randint(0, NUM_ROWS - 1, (sum(counts),), generator=generator)  # the last row goes nowhere
    tensors = (rows, gates, draw(len(counts), hidden, 2 * inner), draw(len(counts), inner, hidden))
    return [t.requires_grad_() for t in tensors], source


def call(tensors, source, counts):
    rows, gates, gate_up, down = tensors
    return routed_swiglu(rows, gates, RowMap.of(source, NUM_ROWS), torch.tensor(counts), gate_up, down)


WAYS = ("in turn", "together")
ALIGNED, NOT_ALIGNED = (8, 16), (6, 5)
# F.grouped_mm refuses fp64, and rows that are no multiple of 16 bytes.
TAKEN = [
    (way, dtype, sizes)
    for way in WAYS
    for dtype in TOLERANCE
    for sizes in (ALIGNED, NOT_ALIGNED)
    if way == "in turn" or (dtype != torch.float64 and sizes == ALIGNED)
]


@pytest.fixture
def way(request, monkeypatch):
    """Both are tried wherever they can be; on CPU only the first is taken otherwise."""
    if request.param == "together":
        monkeypatch.setattr(routed_mlp, "_is_by_expert", lambda rows, weight: False)
    return request.param


both_ways = pytest.mark.parametrize("way", WAYS, indirect=True)


@pytest.mark.parametrize(("way", "dtype", "sizes"), TAKEN, indirect=["way"], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_output_and_gradients_equal_the_loop(way, dtype, counts, sizes):
    fast, source = inputs(counts, dtype, *sizes)
    exact = [t.detach().double().requires_grad_() for t in fast]
    y = call(fast, source, counts)
    expected = slow(exact[0], exact[1], source.tolist(), counts, *exact[2:])
    assert y.dtype == dtype
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(y, fast, upstream)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double(), allow_unused=True, materialize_grads=True)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(y.double(), expected, **close)
    for grad, expected_grad, tensor in zip(grads, expected_grads, fast, strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad.double(), expected_grad, **close)
    assert not y[-1].any() and not grads[0][-1].any()  # routed nowhere
    for expert, count in enumerate(counts):
        if count == 0:
            assert not grads[2][expert].any() and not grads[3][expert].any()


def test_gradcheck():
    tensors, source = inputs([2, 0, 1], torch.float64, 3, 2)
    assert torch.autograd.gradcheck(lambda *t: call(t, source, [2, 0, 1]), tensors)


@both_ways
def test_an_expanded_gradient(way):
    tensors, source = inputs([2, 0, 3, 1], torch.float32)
    call(tensors, source, [2, 0, 3, 1]).sum().backward()  # stride 0
    assert tensors[0].grad.abs().max() > 0


@both_ways
def test_what_is_kept_for_the_backward_pass(way):
    """The rows, the gates, the first product and the weights: no output, no activation, no copy of a row."""
    tensors, source = inputs([2, 0, 3, 1], torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        call(tensors, source, [2, 0, 3, 1])
    floating = [(NUM_ROWS, 8), (6,), (6, 32), (4, 8, 32), (4, 16, 8)]
    assert kept == floating


def test_any_number_of_threads_gives_the_same_bits():
    """Of products that one thread computes; a busy expert's are computed by all threads."""
    counts, found = [3, 0, 2, 4, 1, 3], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tensors, source = inputs(counts, torch.float64)
            output = call(tensors, source, counts)
            output.backward(output.detach().cos())
            found.append([output, *(tensor.grad for tensor in tensors)])
            assert torch.get_num_threads() == threads
            with torch.inference_mode():
                assert torch.equal(call(tensors, source, counts), output)
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(others, found[0], strict=True))


@pytest.mark.parametrize("most_rows", [1, 2, 5])
def test_a_busy_expert_is_computed_in_blocks(monkeypatch, most_rows):
    """The same within rounding of fp64 as at once."""
    counts = [7, 0, 13, 1]
    found = []
    for most in (most_rows, 100):
        monkeypatch.setattr(routed_mlp, "BLOCK_ROWS", most)
        monkeypatch.setattr(routed_mlp, "NUM_BLOCKS", 100)
        tensors, source = inputs(counts, torch.float64)
        output = call(tensors, source, counts)
        output.backward(output.detach().cos())
        found.append([output, *(tensor.grad for tensor in tensors)])
    assert [block.num_rows for block in routed_mlp._blocks(13, 5)] == [4, 4, 5]
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-13)


def test_sums_over_many_blocks_are_rounded_once(monkeypatch):
    """Of bf16 weights: 64 blocks are no further from fp64 than one."""
    counts = [4096]
    found = {}
    for most, dtype in ((4096, torch.float64), (4096, torch.bfloat16), (64, torch.bfloat16)):
        monkeypatch.setattr(routed_mlp, "BLOCK_ROWS", most)
        monkeypatch.setattr(routed_mlp, "NUM_BLOCKS", 100)
        tensors, source = inputs(counts, torch.bfloat16)
        tensors = [
            t.detach().to(torch.promote_types(t.dtype, dtype) if dtype == torch.float64 else t.dtype).requires_grad_()
            for t in tensors
        ]
        call(tensors, source, counts).sum().backward()
        found[most, dtype] = [tensor.grad.double() for tensor in tensors[2:]]
    exact, at_once, in_blocks = found.values()
    for want, once, blocks in zip(exact, at_once, in_blocks, strict=True):
        assert (blocks - want).norm() <= 1.5 * (once - want).norm()


def test_experts_of_any_count_meet_few_shapes(monkeypatch):
    """oneDNN compiles for each."""
    sizes = {
        block.num_rows
        for count in map(routed_mlp._round_up, range(1, 2000))
        for block in routed_mlp._blocks(count, routed_mlp.BLOCK_ROWS)
    }
    assert len(sizes) <= 25 and max(sizes) <= routed_mlp.BLOCK_ROWS + 64
    assert all(count <= routed_mlp._round_up(count) < count + max(16, count / 8) for count in range(1, 5000))

    shapes, product = set(), torch.mm

    def note(left, right, **options):
        shapes.add((left.shape, right.shape))
        return product(left, right, **options)

    monkeypatch.setattr(products, "_multiplies_bf16_faster", lambda: True)
    monkeypatch.setattr(torch, "mm", note)
    for count in range(1, 49):
        tensors, source = inputs([count], torch.bfloat16)
        with torch.no_grad():
            call(tensors, source, [count])
    assert len(shapes) == 2 * 3  # two products of 16, 32 and 48 rows


@pytest.mark.parametrize("counts", [[3, 0, 17, 16], [500, 0, 33, 1]], ids=str)
def test_rounded_counts_change_no_result(monkeypatch, counts):
    """Rows that are added have gate 0: output and gradients are those without them, within rounding of bf16."""
    found = []
    monkeypatch.setattr(products, "_multiplies_bf16_faster", lambda: True)
    for is_rounded in (True, False):
        monkeypatch.setattr(routed_mlp, "compiles_by_shape", lambda rows, rounds=is_rounded: rounds)
        tensors, source = inputs(counts, torch.bfloat16)
        output = call(tensors, source, counts)
        output.backward(output.detach().cos())
        found.append([output, *(tensor.grad for tensor in tensors)])
    for rounded, plain in zip(*found, strict=True):
        assert (rounded - plain).float().norm() <= 2.0**-8 * plain.float().norm()


@both_ways
def test_gates_are_not_rounded_to_the_rows_dtype(way):
    """Activation 3, gate 1 + 2^-8: their product is rounded to 3 + 2^-6; with the gate in bf16, which is 1, it is 3."""
    dtype = torch.bfloat16
    rows, gates = torch.zeros(NUM_ROWS, 8, dtype=dtype), torch.tensor([1 + 2.0**-8])
    rows[0, 0] = 1
    gate_up, down = torch.zeros(1, 8, 16, dtype=dtype), torch.zeros(1, 8, 8, dtype=dtype)
    gate_up[0, 0, 0], gate_up[0, 0, 8] = 64, 3 / 64  # silu(64) is 64
    down[0, 0, 0] = 1
    assert call((rows, gates, gate_up, down), torch.tensor([0]), [1])[0, 0] == 3 + 2.0**-6
    assert call((rows, gates.to(dtype).float(), gate_up, down), torch.tensor([0]), [1])[0, 0] == 3
