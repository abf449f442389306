"""Keys and values held while decoding."""

import torch

from moe_train.model.cache import KeyValue, KeyValueState


def piece(length, start=0, documents=True, batch=2):
    values = torch.arange(batch * 3 * length * 4, dtype=torch.float32).view(batch, 3, length, 4) + 1000 * start
    positions = torch.arange(start, start + length)[None]
    return KeyValue(values, -values, positions, positions // 3 if documents else None)


def test_appended_pieces_are_read_together():
    state = KeyValueState()
    pieces = [piece(2), piece(1, 2), piece(3, 3)]
    for number, new in enumerate(pieces, 1):
        held = state.append(new)
        torch.testing.assert_close(held.k_BGCd, torch.cat([p.k_BGCd for p in pieces[:number]], 2), rtol=0, atol=0)
        torch.testing.assert_close(held.v_BGCd, torch.cat([p.v_BGCd for p in pieces[:number]], 2), rtol=0, atol=0)
    assert held.positions_BC.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert held.documents_BC.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_no_documents():
    state = KeyValueState()
    state.append(piece(2, documents=False))
    assert state.append(piece(1, 2, documents=False)).documents_BC is None


def test_nbytes_counts_keys_and_values():
    state = KeyValueState()
    assert state.nbytes == 0
    state.append(piece(2))
    assert state.nbytes == 2 * (2 * 3 * 2 * 4) * 4
    state.append(piece(3, 2))
    assert state.nbytes == 2 * (2 * 3 * 5 * 4) * 4


def test_restore_forgets_what_was_appended_since():
    state = KeyValueState()
    empty = state.snapshot()
    first = state.append(piece(2))
    mark = state.snapshot()
    before = first.k_BGCd.clone()
    state.append(piece(4, 2))
    state.append(piece(1, 6))
    state.restore(mark)
    assert state.nbytes == 2 * (2 * 3 * 2 * 4) * 4
    held = state.append(piece(1, 9))
    assert held.positions_BC.tolist() == [[0, 1, 9]]
    assert torch.equal(held.k_BGCd[:, :, :2], before)
    state.restore(mark)  # a mark may be used again
    assert state.append(piece(1, 5)).positions_BC.tolist() == [[0, 1, 5]]
    state.restore(empty)
    assert state.nbytes == 0
    assert state.append(piece(1, 5)).positions_BC.tolist() == [[5]]
