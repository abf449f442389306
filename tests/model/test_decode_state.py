"""Keys and values held while decoding."""

import pytest
import torch

from moe_train.model.build import build_model
from moe_train.model.decode_state import CacheSpec, KeyValue, KeyValueState, kv_cache_bytes
from tests.model.small import small_config

HEADS, SIZE, BATCH = 3, 4, 2
CPU = torch.device("cpu")


def piece(length, start=0, documents=True, dtype=torch.float32):
    values = torch.arange(BATCH * HEADS * length * SIZE, dtype=dtype).view(BATCH, HEADS, length, SIZE) + 1000 * start
    positions = torch.arange(start, start + length)[None]
    return KeyValue(values, -values, positions, positions // 3 if documents else None)


def state_of(max_length=8, window=None, dtype=torch.float32, device=CPU):
    return KeyValueState(CacheSpec(BATCH, max_length, dtype, device), HEADS, SIZE, window)


def by_position(held):
    """Keys and values of the first row, by position."""
    places = zip(held.positions_BC[0].tolist(), held.k_BGCd[0].unbind(1), held.v_BGCd[0].unbind(1), strict=True)
    return {position: (k.flatten().tolist(), v.flatten().tolist()) for position, k, v in places}


def test_appended_pieces_are_read_together():
    state = state_of()
    pieces = [piece(2), piece(1, 2), piece(3, 3)]
    for number, new in enumerate(pieces, 1):
        held = state.append(new)
        torch.testing.assert_close(held.k_BGCd, torch.cat([p.k_BGCd for p in pieces[:number]], 2), rtol=0, atol=0)
        torch.testing.assert_close(held.v_BGCd, torch.cat([p.v_BGCd for p in pieces[:number]], 2), rtol=0, atol=0)
    assert held.positions_BC.tolist() == [[0, 1, 2, 3, 4, 5]] * BATCH
    assert held.documents_BC.tolist() == [[0, 0, 0, 1, 1, 1]] * BATCH


def test_no_documents():
    state = state_of()
    state.append(piece(2, documents=False))
    assert state.append(piece(1, 2, documents=False)).documents_BC is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_memory_is_set_aside_at_once_and_stays_where_it_is(dtype):
    state = state_of(5, dtype=dtype)
    expected = 2 * BATCH * HEADS * 5 * SIZE * dtype.itemsize
    assert state.nbytes == expected
    first = state.append(piece(2, dtype=dtype)).k_BGCd.data_ptr()
    assert state.append(piece(1, 2, dtype=dtype)).k_BGCd.data_ptr() == first
    assert state.nbytes == expected


def test_a_narrower_cache_rounds_what_it_takes():
    state = state_of(dtype=torch.bfloat16)
    new = piece(3)
    held = state.append(new)
    assert torch.equal(held.k_BGCd, new.k_BGCd.bfloat16()) and torch.equal(held.v_BGCd, new.v_BGCd.bfloat16())
    windowed = state_of(dtype=torch.bfloat16, window=2)
    assert windowed.append(new).k_BGCd.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 3])
def test_more_than_there_is_room_for(window):
    state = state_of(4, window)
    state.append(piece(3))
    with pytest.raises(ValueError, match=r"5 tokens .* max_length \(4\)"):
        state.append(piece(2, 3))
    assert sorted(by_position(state.append(piece(1, 3)))) == ([0, 1, 2, 3] if window is None else [1, 2, 3])


@pytest.mark.parametrize("lengths", [[1] * 9, [4, 1, 1, 3], [2, 5, 2], [9], [3, 3, 3], [1, 1, 6, 1]], ids=str)
@pytest.mark.parametrize("window", [1, 3, 4, 9, 20])
def test_a_window_keeps_the_last_and_gives_what_new_tokens_see(lengths, window):
    state, whole = state_of(9, window), state_of(9)
    assert state.nbytes == 2 * BATCH * HEADS * min(9, window) * SIZE * 4
    place = 0
    for length in lengths:
        new = piece(length, place)
        expected, found = by_position(whole.append(new)), by_position(state.append(new))
        needed = range(max(0, place - window + 1), place + length)
        assert {position: expected[position] for position in needed} == {p: found[p] for p in needed}
        assert found.items() <= expected.items()
        if length == 1:
            assert len(found) == min(place + 1, window)  # so that one query needs no mask
        place += length


@pytest.mark.parametrize("window", [None, 3])
def test_restore_forgets_what_was_appended_since(window):
    state = state_of(20, window)
    empty = state.snapshot()
    state.append(piece(2))
    mark = state.snapshot()
    for later in (piece(4, 2), piece(1, 2)):  # a mark may be used again
        state.append(later)
        state.append(piece(1, 6))
        state.restore(mark)
    fresh = state_of(20, window)
    fresh.append(piece(2))
    assert by_position(state.append(piece(2, 2))) == by_position(fresh.append(piece(2, 2)))
    state.restore(empty)
    assert state.append(piece(1, 5)).positions_BC.tolist() == [[5]] * BATCH


def test_restore_after_a_window_has_turned_over():
    state, fresh = state_of(20, 3), state_of(20, 3)
    for one in (state, fresh):
        one.append(piece(5))
    mark = state.snapshot()
    state.append(piece(1, 5))
    state.append(piece(3, 6))
    state.restore(mark)
    for start in (5, 6, 7):
        assert by_position(state.append(piece(1, start))) == by_position(fresh.append(piece(1, start)))


# Zuhri et al. 2024, arXiv 2406.09297, and its repository: B = 8, S = 2047, L = 12, H = 12, d = 64, fp32, in MiB.
PUBLISHED = [
    (12, 12, "1151.4375"),
    (12, 4, "383.8125"),
    (4, 12, "383.8125"),
    (12, 1, "95.953"),
    (4, 3, "95.953"),
    (6, 1, "47.977"),
    (2, 1, "15.992"),
    (1, 1, "7.996"),
]


@pytest.mark.parametrize(("owners", "kv_heads", "mebibytes"), PUBLISHED)
def test_published_table(owners, kv_heads, mebibytes):
    """By the formula, and as the cache of a model reports it; on the meta device, which has shapes and no memory."""
    formula = kv_cache_bytes(
        batch_size=8, length=2047, num_owner_layers=owners, num_kv_heads=kv_heads, head_dim=64, bytes_per_element=4
    )
    config = small_config(hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=kv_heads, kv_layers=owners)
    cache = build_model(config, 10).new_cache(8, 2047)
    assert cache.nbytes == formula
    assert len(cache.owner_layers) == owners
    digits = len(mebibytes.partition(".")[2])
    assert f"{formula / 2**20:.{digits}f}" == mebibytes
