"""Attention by blocks against one dense mask: outputs, gradients, and the memory that it takes."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from moe_train.model.token_index import starts_of_documents
from moe_train.ops import attention_blocks, partial_attention, varlen_attention
from moe_train.ops.attention import visible_keys
from moe_train.ops.attention_blocks import attend_blocks, rows_of_documents, rows_of_positions
from tests.ops.tensor_sizes import LargestTensor

CLOSE = {"rtol": 0, "atol": 1e-12}  # fp64, sums of some hundred products of values around 1
CPU = torch.device("cpu")


def draw(batch, heads, groups, length, size=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch, number, length, size, generator=generator, dtype=dtype).requires_grad_()
        for number in (heads, groups, groups)
    ]


def dense(q, k, v, positions, documents, window):
    mask = visible_keys(positions, positions, documents, documents, window)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rows_of_lengths(rows):
    """Document ids of rows that are given as the lengths of their documents."""
    return torch.tensor([[number for number, count in enumerate(row) for _ in range(count)] for row in rows])


def blocks_of(documents, length, window, dtype=torch.float64, size=4):
    starts = None if documents is None else starts_of_documents(documents)
    return rows_of_documents(length, starts, window, CPU, dtype, size)


def assert_equals_dense(inputs, blocks, positions, documents, window):
    ys = attend_blocks(*inputs, blocks), dense(*inputs, positions, documents, window)
    torch.testing.assert_close(*ys, **CLOSE)
    upstream = torch.randn_like(ys[0])
    grads = [torch.autograd.grad(y, inputs, upstream) for y in ys]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@st.composite
def packed_rows(draw_of):
    length = draw_of(st.integers(1, 400))
    number = draw_of(st.sampled_from([1, 2, 9, 400]))
    rows = []
    for _ in range(draw_of(st.integers(1, 3))):
        cuts = draw_of(st.sets(st.integers(1, max(1, length - 1)), max_size=min(number, length) - 1))
        ends = [0, *sorted(cut for cut in cuts if cut < length), length]
        rows.append([end - first for first, end in pairwise(ends)])
    return rows


@given(
    packed_rows(), st.sampled_from([None, 1, 5, 64, 100, 512]), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_equals_the_dense_mask_with_gradients(rows, window, heads, is_packed):
    documents = rows_of_lengths(rows)
    batch, length = documents.shape
    documents = documents if is_packed else None
    blocks = blocks_of(documents, length, window)
    assert_equals_dense(draw(batch, *heads, length), blocks, torch.arange(length)[None], documents, window)


@pytest.mark.parametrize("window", [None, 30])
def test_long_rows_are_cut_where_no_kernel_takes_them(monkeypatch, window):
    """As on CUDA in fp32: blocks of queries in a document too, and products that are written out."""
    monkeypatch.setattr(partial_attention, "_HAS_CPU_KERNEL", frozenset())
    monkeypatch.setattr(attention_blocks, "MOST_BLOCK", 64)
    documents = rows_of_lengths([[150, 1, 49], [200]])
    blocks = blocks_of(documents, 200, window)
    spans = blocks.table_n7[:, 3] - blocks.table_n7[:, 2]
    assert spans.max() == 64 and len(spans) >= 8
    assert_equals_dense(draw(2, 4, 2, 200), blocks, torch.arange(200)[None], documents, window)


@pytest.mark.parametrize("documents", [None, [[0] * 300 + [1] * 400, [7] * 50 + [3] * 50 + [7] * 600]], ids=str)
def test_positions_in_any_order(documents):
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.randperm(700, generator=generator) for _ in range(2)])
    documents = None if documents is None else torch.tensor(documents)
    blocks = rows_of_positions(positions, documents, 90)
    assert len(blocks.table_n7) == 2
    assert_equals_dense(draw(2, 2, 1, 700), blocks, positions, documents, 90)


def test_equal_ids_apart_are_two_documents_and_equal_rows_are_one_block():
    apart = blocks_of(torch.tensor([[4] * 3 + [2] * 3 + [4] * 3]), 9, None)
    other = blocks_of(torch.tensor([[4] * 3 + [2] * 3 + [5] * 3]), 9, None)
    inputs = draw(1, 2, 2, 9)
    assert torch.equal(attend_blocks(*inputs, apart), attend_blocks(*inputs, other))
    same = blocks_of(rows_of_lengths([[100, 200], [100, 200], [300]]), 300, None)
    assert same.table_n7[:, :2].tolist() == [[0, 2], [0, 2], [2, 3]]
    assert not same.table_n7[:, 6].any()  # whole documents need no mask


def test_a_packed_document_is_what_it_is_alone_to_the_last_bit():
    lengths = [200, 65, 300, 90]
    inputs, place = draw(1, 4, 2, sum(lengths), dtype=torch.float32), 0
    packed = attend_blocks(*inputs, blocks_of(rows_of_lengths([lengths]), sum(lengths), None, torch.float32))
    for length in lengths:
        part = [x[:, :, place : place + length] for x in inputs]
        alone = attend_blocks(*part, blocks_of(None, length, None, torch.float32))
        assert torch.equal(packed[:, :, place : place + length], alone)
        place += length


def test_gradcheck():
    blocks = blocks_of(rows_of_lengths([[3, 4], [7]]), 7, 3)
    assert torch.autograd.gradcheck(lambda *x: attend_blocks(*x, blocks), draw(2, 2, 1, 7, size=2))


def test_half_precision_adds_gradients_in_fp32():
    inputs = [x.detach().bfloat16().requires_grad_() for x in draw(1, 2, 1, 900, size=16)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    blocks = blocks_of(None, 900, 400)
    ys = attend_blocks(*inputs, blocks), attend_blocks(*exact, blocks)
    assert ys[0].dtype == torch.bfloat16
    upstream = torch.ones_like(ys[0])
    grads = [torch.autograd.grad(y, x, upstream.to(y.dtype)) for y, x in zip(ys, (inputs, exact), strict=True)]
    for mine, theirs in zip(*grads, strict=True):
        # The kernel rounds shares to 8 bits, and each block's result once more.
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm() + 0.02


@pytest.mark.parametrize("window, is_packed", [(None, True), (64, True), (64, False)])
def test_no_tensor_grows_with_the_square_of_the_length(window, is_packed):
    largest = []
    for length in (2048, 8192):
        documents = rows_of_lengths([[256] * (length // 256)]) if is_packed else None
        inputs = draw(1, 1, 1, length, size=2, dtype=torch.float32)
        with LargestTensor() as seen:
            attend_blocks(*inputs, blocks_of(documents, length, window, torch.float32)).sum().backward()
        largest.append(seen.elements)
    # Queries, or the mask of a block of 64 queries, or of what is left of 128 keys.
    assert largest[1] <= 4 * largest[0] and largest[0] <= 2048 * 8


def slow_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, enable_gqa):
    """torch's kernel as documented: sequence by sequence, `window_size` positions before and behind the query's own."""
    assert (
        torch.equal(starts_q, starts_k) and starts_q.dtype == torch.int32 and enable_gqa == (q.shape[1] != k.shape[1])
    )
    assert longest_q == longest_k == starts_q.diff().max()
    parts, (before, behind) = [], window_size
    assert behind == 0
    for first, end in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        own = [x[first:end].transpose(0, 1)[None] for x in (q, k, v)]
        window = None if before == -1 else before + 1
        parts.append(dense(*own, torch.arange(end - first)[None], None, window)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", [None, [[2, 7], [9], [1, 1, 7]]])
def test_the_kernel_for_rows_of_any_length_gets_documents_and_windows(monkeypatch, rows, window):
    monkeypatch.setattr(varlen, "varlen_attn", slow_varlen)
    monkeypatch.setattr(attention_blocks, "takes_varlen", lambda device, dtype, size: True)
    documents = None if rows is None else rows_of_lengths(rows)
    blocks = blocks_of(documents, 9, window)
    assert blocks.longest == 9
    assert_equals_dense(draw(3, 4, 2, 9), blocks, torch.arange(9)[None], documents, window)


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_kernel_takes_these_arguments(window):
    """Without a GPU, by shapes alone: the kernel itself is not run."""
    assert varlen_attention._has_kernel()
    with FakeTensorMode():
        inputs = [torch.zeros(2, n, 9, 16, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
        starts = torch.zeros(4, dtype=torch.int32)
        out = varlen_attention.varlen_attention(*inputs, starts, 9, window)
        out.sum().backward()
    assert out.shape == (2, 4, 9, 16) and [each.grad.shape for each in inputs] == [each.shape for each in inputs]


def test_the_kernel_is_for_16_bits_on_cuda(monkeypatch):
    takes = varlen_attention.takes_varlen
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda:0")
    assert takes(cuda, torch.bfloat16, 128) and takes(cuda, torch.float16, 64)
    assert not takes(cuda, torch.float32, 128) and not takes(CPU, torch.bfloat16, 128)
    assert not takes(cuda, torch.bfloat16, 100) and not takes(cuda, torch.bfloat16, 264)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not takes(cuda, torch.bfloat16, 128)
    monkeypatch.setattr(varlen_attention, "_has_kernel", lambda: False)  # an older torch
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not takes(cuda, torch.bfloat16, 128)
