"""Blocks of queries and keys of a shared row: every visible pair once, masks only where they are needed, and small."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.model.token_index import document_offsets
from moe_train.ops import ring_attention
from moe_train.ops.attention import visible_keys
from moe_train.ops.ring_attention import BlockGradients, MergedAttention, Reach, RowVisibility, zigzag_spans

LENGTH, TURN = 48, 4


@pytest.fixture(scope="module", autouse=True)
def small_turns():
    """Turns of 4 queries, so that a row of 48 tokens has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_attention, "_MOST_QUERIES", TURN)
        yield


def columns_of(size: int, rank: int) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.arange(*span) for span in zigzag_spans(LENGTH, size, rank)]))


rows = st.lists(st.lists(st.integers(1, LENGTH - 1), max_size=5), min_size=1, max_size=2)


def visibility_of(cuts: list[list[int]], window: int | None) -> tuple[RowVisibility, torch.Tensor]:
    """Documents that begin at some positions of each row, and what is visible, bool [B, 1, S, S]."""
    documents_BS = torch.zeros(len(cuts), LENGTH, dtype=torch.int64)
    for row, own in enumerate(cuts):
        for cut in set(own):
            documents_BS[row, cut:] += 1
    reach = Reach.of(document_offsets(documents_BS).numpy())
    positions = torch.arange(LENGTH)[None]
    visible = visible_keys(positions, positions, documents_BS, documents_BS, window)
    return RowVisibility(LENGTH, window, documents_BS, reach), visible.expand(len(cuts), 1, LENGTH, LENGTH)


@settings(max_examples=150, deadline=None)
@given(cuts=rows, window=st.none() | st.integers(1, LENGTH), size=st.sampled_from([1, 2, 4]))
def test_every_visible_pair_is_in_one_block(cuts: list[list[int]], window: int | None, size: int) -> None:
    visibility, visible = visibility_of(cuts, window)
    seen = torch.zeros_like(visible, dtype=torch.int64)
    for rank in range(size):
        begun = torch.zeros(LENGTH // size, dtype=torch.bool)
        for source in ring_attention_order(rank, size):
            for block in visibility.blocks(size, rank, source):
                queries, keys = columns_of(size, rank)[block.queries], columns_of(size, source)[block.keys]
                here = visible[:, :, queries[:, None], keys]
                mask = visibility.mask(block, torch.device("cpu"))
                assert torch.equal(here, torch.ones_like(here) if mask is None else mask.expand_as(here))
                assert block.is_first == (not bool(begun[block.queries].any()))
                if block.is_first:
                    assert here.any(-1).all(), "each query sees a key of its first block"
                begun[block.queries] = True
                seen[:, :, queries[:, None], keys] += here
        assert begun.all()
    assert torch.equal(seen, visible.to(torch.int64))


def ring_attention_order(rank: int, size: int) -> list[int]:
    return [(rank - step) % size for step in range(size)]


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=5), window=st.none() | st.integers(1, LENGTH))
@pytest.mark.parametrize("size", [1, 2])
def test_masks_of_one_row_are_small(cuts: list[int], window: int | None, size: int) -> None:
    """A few turns of queries and keys: with one row, no mask grows with the row."""
    visibility, _ = visibility_of([cuts], window)
    for rank in range(size):
        for source in range(size):
            for block in visibility.blocks(size, rank, source):
                mask = visibility.mask(block, torch.device("cpu"))
                assert mask is None or mask.shape[-1] <= 4 * TURN


@settings(max_examples=25, deadline=None)
@given(cuts=rows, window=st.none() | st.integers(1, LENGTH), size=st.sampled_from([1, 2, 4]))
def test_merged_attention_and_gradients_are_those_of_a_mask(
    cuts: list[list[int]], window: int | None, size: int
) -> None:
    visibility, visible = visibility_of(cuts, window)
    random = torch.Generator().manual_seed(size)
    shapes = [(len(cuts), heads, LENGTH, 8) for heads in (4, 2, 2, 4)]
    q, k, v, upstream = (torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=visible, enable_gqa=True)
    expected.backward(upstream)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rank in range(size):
        mine = columns_of(size, rank)
        merged = MergedAttention(q[:, :, mine], visibility)
        parts = [
            (block, columns_of(size, source))
            for source in ring_attention_order(rank, size)
            for block in visibility.blocks(size, rank, source)
        ]
        for block, columns in parts:
            merged.add(block, k[:, :, columns], v[:, :, columns])
        torch.testing.assert_close(merged.out_BHsd, expected[:, :, mine], rtol=0, atol=1e-12)
        gradients = BlockGradients(upstream[:, :, mine], q[:, :, mine], merged.out_BHsd, merged.lse_BHs, visibility)
        for block, columns in parts:
            dk_part, dv_part = dk[:, :, columns], dv[:, :, columns]
            gradients.add(block, k[:, :, columns], v[:, :, columns], dk_part, dv_part)
            dk[:, :, columns], dv[:, :, columns] = dk_part, dv_part
        torch.testing.assert_close(gradients.dq_BHsd, leaves[0].grad[:, :, mine], rtol=0, atol=1e-12)
    torch.testing.assert_close(dk, leaves[1].grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(dv, leaves[2].grad, rtol=0, atol=1e-12)
