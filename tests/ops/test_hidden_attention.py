"""Attention of hidden copies against one dense mask, written from the definition, and its gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moe_train.model.token_index import document_offsets, starts_of_documents
from moe_train.ops.attention_blocks import rows_of_documents
from moe_train.ops.hidden_attention import hidden_attention, hidden_blocks
from moe_train.ops.partial_attention import (
    _takes_flash,
    additive,
    merge_attention,
    partial_attention,
    partial_attention_backward,
)

CLOSE = {"rtol": 0, "atol": 1e-12}  # fp64, sums of some dozen products
PACKED = torch.tensor([[0] * 5 + [1] * 3 + [2] * 13, [4] * 2 + [5] * 11 + [6] * 8])
CASES = [  # copies, W, C, positions, query heads, key heads
    (2, 0, None, 8, 4, 2),
    (3, 0, None, 7, 4, 1),
    (2, 3, None, 11, 4, 2),
    (3, 2, None, 9, 2, 1),
    (2, 2, 4, 10, 4, 2),
    (3, 3, 4, 13, 4, 4),
    (3, 5, 3, 13, 2, 2),
    (4, 1, None, 5, 2, 2),
    (2, 16, 32, 70, 4, 2),
    (3, 20, 8, 41, 2, 2),
    (2, 20, None, 41, 2, 1),
    (3, 40, 100, 6, 2, 1),
]


def sees(query, key, window, chunk, offset, documents, sliding=None):
    """Whether query (p, j) sees key (m, i): copies are 1, ..., n."""
    (p, j), (m, i) = query, key
    if documents is not None and documents[p] != documents[m]:
        return False
    if i == 1:
        return m <= p and (sliding is None or m > p - sliding)
    if m == p:
        return i <= j
    in_chunk = chunk is None or offset[m] // chunk == offset[p] // chunk
    return j >= 2 and p - window <= m < p and in_chunk


def dense(q, k, v, copies, window, chunk, documents=None, sliding=None):
    """Attention with the mask of all copies times all copies, in the order of the stream."""
    batch, heads, length, _ = q.shape
    positions = length // copies
    stream = [(p, j) for j in range(1, copies + 1) for p in range(positions)]
    offsets = torch.arange(positions).expand(batch, -1) if documents is None else document_offsets(documents)
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        own = None if documents is None else documents[b].tolist()
        for a, query in enumerate(stream):
            for c, key in enumerate(stream):
                mask[b, 0, a, c] = sees(query, key, window, chunk, offsets[b].tolist(), own, sliding)
    repeats = heads // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def ours(q, k, v, copies, window, chunk, documents=None, sliding=None):
    positions = torch.arange(q.shape[2] // copies)[None]
    offsets = positions if documents is None else document_offsets(documents)
    originals = None
    if documents is not None or sliding is not None:
        starts = None if documents is None else starts_of_documents(documents)
        originals = rows_of_documents(positions.shape[1], starts, sliding, q.device, q.dtype, q.shape[3])
    return hidden_attention(q, k, v, hidden_blocks(offsets, copies, window, chunk), originals)


def draw(copies, positions, heads, groups, batch=2, size=4):
    generator = torch.Generator().manual_seed(copies * 100 + positions)
    shape = (batch, copies * positions, size)
    return tuple(
        torch.randn(shape[0], number, *shape[1:], dtype=torch.float64, generator=generator, requires_grad=True)
        for number in (heads, groups, groups)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_dense_mask_with_gradients(case):
    copies, window, chunk, positions, heads, groups = case
    inputs = draw(copies, positions, heads, groups)
    ys = [each(*inputs, copies, window, chunk) for each in (ours, dense)]
    torch.testing.assert_close(*ys, **CLOSE)
    upstream = torch.randn_like(ys[0])
    grads = [torch.autograd.grad(y, inputs, upstream) for y in ys]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("sliding", [None, 4], ids=["all", "sliding"])
@pytest.mark.parametrize("window, chunk", [(0, None), (3, None), (3, 4), (18, 20)], ids=str)
def test_documents_and_a_sliding_window(window, chunk, sliding):
    inputs = draw(3, PACKED.shape[1], 4, 2)
    ys = [each(*inputs, 3, window, chunk, PACKED, sliding) for each in (ours, dense)]
    torch.testing.assert_close(*ys, **CLOSE)
    upstream = torch.randn_like(ys[0])
    grads = [torch.autograd.grad(y, inputs, upstream) for y in ys]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_window_of_zero_is_not_a_window_and_long_chunks_are_none():
    inputs = draw(3, 9, 2, 1)
    assert torch.equal(ours(*inputs, 3, 0, None), ours(*inputs, 3, 4, 1))  # a chunk of one position
    assert torch.equal(ours(*inputs, 3, 4, None), ours(*inputs, 3, 4, 9))
    assert not torch.allclose(ours(*inputs, 3, 4, None), ours(*inputs, 3, 4, 8))


def test_gradcheck():
    inputs = draw(3, 5, 2, 1, batch=1, size=2)
    assert torch.autograd.gradcheck(lambda *x: ours(*x, 3, 2, 4), inputs)


@pytest.mark.parametrize("window", [0, 3])
def test_equal_copies_add_log_j_to_the_diagonal_and_log_n_to_the_window(window):
    """At layer 0 all copies of a token have the same query, key and value."""
    copies, positions = 3, 9
    q, k, v = (x.detach() for x in draw(1, positions, 2, 2))
    y = ours(*(x.repeat(1, 1, copies, 1) for x in (q, k, v)), copies, window, None)
    place = torch.arange(positions)
    distance = place[:, None] - place
    for j in range(1, copies + 1):
        bias = torch.zeros(positions, positions, dtype=torch.float64).masked_fill(distance < 0, -math.inf)
        bias[distance == 0] = math.log(j)
        if j > 1:
            bias[(distance > 0) & (distance <= window)] = math.log(copies)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        torch.testing.assert_close(y[:, :, (j - 1) * positions : j * positions], expected, **CLOSE)


def test_originals_are_plain_attention():
    q, k, v = draw(2, 37, 4, 2)
    y = ours(q, k, v, 2, 5, None)[:, :, :37]
    plain = F.scaled_dot_product_attention(q[:, :, :37], k[:, :, :37], v[:, :, :37], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(y, plain, **CLOSE)


def test_half_precision_merges_in_fp32():
    inputs = [x.detach() for x in draw(2, 70, 4, 2)]
    narrow = ours(*(x.bfloat16() for x in inputs), 2, 16, 32)
    assert narrow.dtype == torch.bfloat16
    exact = ours(*(x.bfloat16().double() for x in inputs), 2, 16, 32)
    assert (narrow.double() - exact).abs().max() < 0.02  # two roundings to 8 bits of values up to about 2


def test_gradients_in_half_precision_are_those_of_fp64():
    """Backward through both kernels and the merge, with the merged output and logsumexp."""
    inputs = [x.detach().bfloat16() for x in draw(2, 70, 4, 2)]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = []
    for wide in (torch.bfloat16, torch.float64):
        leaves = [x.to(wide).requires_grad_() for x in inputs]
        y = ours(*leaves, 2, 16, 32)
        grads.append(torch.autograd.grad(y, leaves, upstream.to(wide)))
    for narrow, exact in zip(*grads, strict=True):
        assert narrow.dtype == torch.bfloat16
        # Some roundings to 8 bits in sums of up to 86 keys or queries: 2^-8 of the largest each.
        assert (narrow.double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("window, chunk", [(0, None), (3, None), (3, 4)], ids=str)
def test_regrouped_copies_are_interleaved_ones_in_another_order(window, chunk):
    """The stream has copy 2 of all tokens behind all originals; the definition has all copies of a token together."""
    copies, positions = 3, 9
    q, k, v = (x.detach() for x in draw(copies, positions, 4, 2))
    interleaved = [(p, j) for p in range(positions) for j in range(1, copies + 1)]
    place = torch.tensor([(j - 1) * positions + p for p, j in interleaved])  # of each in the stream
    offsets = list(range(positions))
    mask = torch.tensor([[sees(a, b, window, chunk, offsets, None) for b in interleaved] for a in interleaved])
    shared = (x[:, :, place].repeat_interleave(2, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q[:, :, place], *shared, attn_mask=mask)
    torch.testing.assert_close(ours(q, k, v, copies, window, chunk)[:, :, place], expected, **CLOSE)


def test_explicit_products_are_the_kernels(monkeypatch):
    """Products that devices without a fitting kernel compute, against the CPU's kernels, for both masks."""
    q, k, v = (x.detach() for x in draw(1, 7, 4, 2))
    mask = additive(torch.rand(2, 1, 7, 7) > 0.4, torch.float64).tril().masked_fill_(torch.eye(7).bool(), 0.0)
    gradient = torch.randn_like(q)
    for arguments in ((None, True), (mask, False)):
        expected = partial_attention(q, k, v, *arguments)
        slopes = partial_attention_backward(gradient, q, k, v, *expected, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr("moe_train.ops.partial_attention._HAS_CPU_KERNEL", frozenset())
            found = partial_attention(q, k, v, *arguments)
            again = partial_attention_backward(gradient, q, k, v, *found, *arguments)
        for mine, theirs in zip((*found, *again), (*expected, *slopes), strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "masked", "takes"),
    [
        (torch.bfloat16, 64, (8, 0), False, True),
        (torch.float16, 256, (9, 0), False, True),
        (torch.bfloat16, 8, (12, 0), False, True),
        (torch.bfloat16, 64, (7, 5), False, False),
        (torch.bfloat16, 36, (8, 0), False, False),
        (torch.bfloat16, 264, (8, 0), False, False),
        (torch.float32, 64, (8, 0), False, False),
        (torch.bfloat16, 64, (8, 0), True, False),
    ],
)
def test_the_flash_kernel_gets_only_what_it_takes(monkeypatch, dtype, size, capability, masked, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    queries = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 2, 5, size))
    assert _takes_flash(queries, torch.zeros(1) if masked else None) is takes
    assert not _takes_flash(torch.zeros(1, 2, 5, size, dtype=dtype), None)  # on another device


def test_merged_parts_are_the_whole():
    q, k, v = (x.detach() for x in draw(1, 8, 2, 2))
    whole, lse = partial_attention(q, k, v, None, is_causal=False)
    parts = [
        partial_attention(q, k[:, :, part], v[:, :, part], None, is_causal=False) for part in (slice(3), slice(3, 8))
    ]
    out, merged_lse = merge_attention(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole, **CLOSE)
    torch.testing.assert_close(merged_lse, lse, **CLOSE)
