"""Aligned blocks: every token in the block and column that its offset says, in whole rows, packed rows and parts."""

import pytest
import torch

from moe_train.model.token_index import document_offsets
from moe_train.ops.aligned_blocks import AlignedBlocks, align

DOCUMENTS = torch.tensor([[0] * 11, [-1] * 3 + [0] * 8, [0] * 2 + [1] * 5 + [2] * 4])
OFFSETS = document_offsets(DOCUMENTS)


def by_hand(offsets: torch.Tensor, size: int, start: int) -> tuple[list[list[int]], list[bool], list[bool]]:
    """Tokens of the blocks of one row from a column on, whether each begins a document, and whether it is full."""
    blocks, begins, full = [], [], []
    for place, offset in enumerate(offsets[start:].tolist()):
        if offset % size == 0 or place == 0:
            blocks.append([])
            begins.append(offset == 0)
            full.append(False)
        blocks[-1].append(place)
        full[-1] = offset % size == size - 1
    return blocks, begins, full


@pytest.mark.parametrize("size", [1, 3, 4, 20])
@pytest.mark.parametrize("start", [0, 1, 5, 10])
@pytest.mark.parametrize("is_compact", [False, True])
def test_tokens_are_in_the_blocks_of_their_offsets(size, start, is_compact):
    blocks = align(OFFSETS[:, start:], size, is_compact=is_compact)
    length = OFFSETS.shape[1] - start
    tokens = torch.arange(1, length + 1).expand(3, -1)
    laid = blocks.split(tokens)
    assert blocks.width == (min(size, length) if is_compact else size)
    for row in range(3):
        expected, begins, full = by_hand(OFFSETS[row], size, start)
        assert [[token - 1 for token in block if token] for block in laid[row].tolist()[: len(expected)]] == expected
        assert not laid[row, len(expected) :].any()
        for number, block in enumerate(expected):
            column = 0 if is_compact else int(OFFSETS[row, start + block[0]]) % size
            assert laid[row, number, column] == block[0] + 1
        padding = [False] * (blocks.num_blocks - len(expected))
        assert blocks.begins_Bn[row].tolist() == begins + padding
        assert blocks.is_full_Bn[row].tolist() == full + padding
        assert blocks.last_B[row] == len(expected) - 1
        assert blocks.last(laid)[row].tolist() == laid[row, len(expected) - 1].tolist()
    assert torch.equal(blocks.join(laid, length), tokens)


@pytest.mark.parametrize("size", [1, 4, 11, 30])
def test_whole_rows_need_no_places(size):
    width = min(size, 11)
    found = AlignedBlocks.of_whole_rows(11, size, width, torch.device("cpu"))
    known = align(torch.arange(11)[None], size, width=width)
    assert found.places_BS is None and (found.num_blocks, found.width) == (known.num_blocks, known.width)
    for name in ("begins_Bn", "is_full_Bn", "last_B"):
        assert torch.equal(getattr(found, name), getattr(known, name)), name
    x = torch.randn(3, 11, 2, 5)
    assert torch.equal(found.split(x), known.split(x))
    assert torch.equal(found.join(found.split(x), 11), x) and torch.equal(known.join(known.split(x), 11), x)


def test_a_token_that_is_not_valid_is_in_no_block():
    valid = torch.arange(11) < torch.tensor([[0], [4], [11]])
    blocks = align(OFFSETS, 3, valid)
    laid = blocks.split(torch.arange(1, 12).expand(3, -1))
    assert laid[0].sum() == 0 and sorted(laid[1][laid[1] > 0].tolist()) == [1, 2, 3, 4]
    assert blocks.last_B.tolist() == [0, 1, 4] and not blocks.begins_Bn[0].any() and not blocks.is_full_Bn[0].any()


@pytest.mark.parametrize("is_compact", [False, True])
def test_blocks_beyond_the_last_are_empty(is_compact):
    """A number of blocks that the host knows needs no look at the offsets; more than there are change nothing."""
    known, more = (align(OFFSETS[:, 2:], 3, is_compact=is_compact, num_blocks=number) for number in (None, 9))
    assert more.num_blocks == 9 > known.num_blocks
    tokens = torch.arange(1, 10).expand(3, -1)
    laid, wider = known.split(tokens), more.split(tokens)
    assert torch.equal(wider[:, : known.num_blocks], laid) and not wider[:, known.num_blocks :].any()
    assert torch.equal(more.join(wider, 9), tokens) and torch.equal(more.last_B, known.last_B)
    for name in ("begins_Bn", "is_full_Bn"):
        found = getattr(more, name)
        assert torch.equal(found[:, : known.num_blocks], getattr(known, name))
        assert not found[:, known.num_blocks :].any()
