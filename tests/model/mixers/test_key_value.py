"""Keys and values held while decoding."""

import pytest
import torch

from moe_train.model.build import build_model
from moe_train.model.decode_state import CacheSpec
from moe_train.model.mixers.key_value import KeyValue, KeyValueState, kv_cache_bytes, widest
from tests.model.small import small_config

HEADS, SIZE, BATCH = 3, 4, 2
CPU = torch.device("cpu")


def piece(length, start=0, documents=True, dtype=torch.float32):
    values = torch.arange(BATCH * HEADS * length * SIZE, dtype=dtype).view(BATCH, HEADS, length, SIZE) + 1000 * start
    positions = torch.arange(start, start + length)[None]
    return KeyValue(values, -values, positions, positions // 3 if documents else None)


def state_of(max_length=8, window=None, dtype=torch.float32, device=CPU):
    windows = window if isinstance(window, tuple) else (window,)
    return KeyValueState(CacheSpec(BATCH, max_length, dtype, device), HEADS, SIZE, windows)


NOWHERE = torch.iinfo(torch.int64).max


class Filled:
    """A state, filled as attention does it, that tells where each key stands."""

    def __init__(self, *args, **options):
        self.state, self.end = state_of(*args, **options), 0

    def append(self, new):
        self.end = int(new.positions_BC.max()) + 1
        first = int(new.positions_BC[0, 0]) if len(new.positions_BC) == 1 else None
        return self.state.append(new, first)

    def by_position(self, held, row=0):
        """Keys and values of a row by position, without columns that hold none."""
        count = held.k_BGCd.shape[2]
        positions = held.positions_BC
        if positions is None:
            positions = self.state._positions_BC[:, :count]
            if count > positions.shape[1]:  # more than are kept: held ones and new ones, in order
                positions = torch.arange(self.end - count, self.end).expand(BATCH, -1)
            assert sorted(positions[row].tolist()) == list(range(self.end - count, self.end))
        places = zip(positions[row].tolist(), held.k_BGCd[row].unbind(1), held.v_BGCd[row].unbind(1), strict=True)
        return {p: (k.flatten().tolist(), v.flatten().tolist()) for p, k, v in places if p != NOWHERE}

    def take(self, new, row=0):
        return self.by_position(self.append(new), row)


def test_appended_pieces_are_read_together():
    state = state_of()
    pieces = [piece(2), piece(1, 2), piece(3, 3)]
    for number, new in enumerate(pieces, 1):
        held = state.append(new, int(new.positions_BC[0, 0]))
        torch.testing.assert_close(held.k_BGCd, torch.cat([p.k_BGCd for p in pieces[:number]], 2), rtol=0, atol=0)
        torch.testing.assert_close(held.v_BGCd, torch.cat([p.v_BGCd for p in pieces[:number]], 2), rtol=0, atol=0)
    assert held.positions_BC is None  # the last six positions, in their order
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
    filled = Filled(4, window)
    filled.append(piece(3))
    assert sorted(filled.take(piece(1, 3))) == ([0, 1, 2, 3] if window is None else [1, 2, 3])


@pytest.mark.parametrize("lengths", [[1] * 9, [4, 1, 1, 3], [2, 5, 2], [9], [3, 3, 3], [1, 1, 6, 1]], ids=str)
@pytest.mark.parametrize("window", [1, 3, 4, 9, 20])
def test_a_window_keeps_the_last_and_gives_what_new_tokens_see(lengths, window):
    state, whole = Filled(9, window), Filled(9)
    assert state.state.nbytes == 2 * BATCH * HEADS * min(9, window) * SIZE * 4
    place = 0
    for length in lengths:
        new = piece(length, place)
        expected, found = whole.take(new), state.take(new)
        needed = range(max(0, place - window + 1), place + length)
        assert {position: expected[position] for position in needed} == {p: found[p] for p in needed}
        assert found.items() <= expected.items()
        if length == 1:
            assert len(found) == min(place + 1, window)  # so that one query needs no mask
        place += length


@pytest.mark.parametrize("window", [None, 3])
def test_restore_forgets_what_was_appended_since(window):
    filled = Filled(20, window)
    empty = filled.state.snapshot()
    filled.append(piece(2))
    mark = filled.state.snapshot()
    for later in (piece(4, 2), piece(1, 2)):  # a mark may be used again
        filled.append(later)
        filled.append(piece(1, 6))
        filled.state.restore(mark)
    fresh = Filled(20, window)
    fresh.append(piece(2))
    assert filled.take(piece(2, 2)) == fresh.take(piece(2, 2))
    filled.state.restore(empty)
    assert list(filled.take(piece(1, 5))) == [5]


def test_restore_after_a_window_has_turned_over():
    state, fresh = Filled(20, 3), Filled(20, 3)
    for one in (state, fresh):
        one.append(piece(5))
    mark = state.state.snapshot()
    state.append(piece(1, 5))
    state.append(piece(3, 6))
    state.state.restore(mark)
    for start in (5, 6, 7):
        assert state.take(piece(1, start)) == fresh.take(piece(1, start))


def rows_of(new, positions):
    """New tokens whose rows stand at positions of their own."""
    return KeyValue(new.k_BGCd, new.v_BGCd, torch.tensor(positions), new.documents_BC)


@pytest.mark.parametrize("window", [None, 2, 3, 5])
@pytest.mark.parametrize("counts", [(0, 0), (2, 2), (3, 3), (1, 3), (0, 2), (3, 0)], ids=str)
@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("pieces", [(3,), (1, 2), (2, 1)], ids=str)
def test_keep_is_as_if_only_those_tokens_had_been_appended(window, counts, start, pieces):
    """Rows keep different numbers of proposed tokens; each goes on as a sequence of its own would have."""
    filled = Filled(20, window)
    if start:
        filled.append(piece(start, documents=False))
    mark = filled.state.snapshot()
    place, proposed = start, []
    for length in pieces:
        proposed.append(piece(length, place, documents=False))
        filled.append(proposed[-1])
        place += length
    filled.state.keep(mark, torch.tensor(counts))
    after = [piece(1, 50, documents=False), piece(2, 60, documents=False), piece(1, 70, documents=False)]
    keys, values = (torch.cat([getattr(p, name) for p in proposed], 2) for name in ("k_BGCd", "v_BGCd"))
    alone = [Filled(20, window) for _ in counts]
    for row, count in enumerate(counts):
        if start:
            alone[row].append(piece(start, documents=False))
        if count:
            positions = torch.arange(start, start + count)[None]
            alone[row].append(KeyValue(keys[:, :, :count], values[:, :, :count], positions, None))
    for offset, new in zip((0, 1, 3), after, strict=True):
        length = new.k_BGCd.shape[2]
        positions = [[start + count + offset + i for i in range(length)] for count in counts]
        held = filled.append(rows_of(new, positions))
        for row in range(BATCH):
            expected = alone[row].take(rows_of(new, [positions[row]]), row)
            found = filled.by_position(held, row)
            needed = {p for p in expected if window is None or p > positions[row][0] - window}
            assert {p: expected[p] for p in needed} == {p: found.get(p) for p in needed}
            assert found.items() <= expected.items() or window is not None


def test_a_mark_can_be_restored_after_rows_were_kept_apart():
    filled, fresh = Filled(20), Filled(20)
    for one in (filled, fresh):
        one.append(piece(2, documents=False))
    mark = filled.state.snapshot()
    filled.append(piece(3, 2, documents=False))
    filled.state.keep(mark, torch.tensor([1, 3]))
    filled.state.restore(mark)
    assert filled.take(piece(1, 2, documents=False)) == fresh.take(piece(1, 2, documents=False))
    assert filled.state.append(piece(1, 3, documents=False), 3).positions_BC is None  # in order again


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
    assert len(cache.layers_with_state) == owners
    digits = len(mebibytes.partition(".")[2])
    assert f"{formula / 2**20:.{digits}f}" == mebibytes


def test_the_widest_reader_decides_what_is_kept():
    assert widest((3, 5)) == 5 and widest((3, None)) is None and widest((2,)) == 2
    assert state_of(max_length=8, window=(2, 5)).nbytes == state_of(max_length=5).nbytes
    assert state_of(max_length=8, window=(2, None)).nbytes == state_of(max_length=8).nbytes


def test_a_narrower_reader_is_told_where_the_keys_are():
    """A single query that sees all keys may see them in any order, but a layer with a smaller window may not."""
    for windows, has_positions in (((3, 3), False), ((3, 2), True)):
        state = state_of(window=windows, max_length=8)
        for start in range(5):
            held = state.append(piece(1, start, documents=False), start)
            assert (held.positions_BC is not None) == (has_positions and start >= 3)


def test_a_prompt_in_an_empty_window_is_in_order():
    held = state_of(window=3, max_length=8).append(piece(6, documents=False), 0)
    assert held.positions_BC is None and held.k_BGCd.shape[2] == 6
