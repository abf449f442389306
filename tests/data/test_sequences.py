"""Sequences cut from token streams, against slow references."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.cache import StreamSize, TokenCache
from moe_train.data.sequences import (
    HeldOut,
    TrainEntry,
    TrainingSequences,
    document_ids,
    join_held_out,
)


def held_out_of(tokens, sequence_length):
    return HeldOut(np.asarray(tokens, np.uint16), sequence_length, 256, 1, 10, {})


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(2, 300), length=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_an_epoch_has_every_target_once(tokens, length, seed):
    stream = np.arange(1000, 1000 + tokens, dtype=np.uint16)  # every token tells its place
    if tokens - 1 < length:
        with pytest.raises(ValueError, match=f"at least one sequence of {length} tokens; they hold \\[0\\]"):
            TrainingSequences((TrainEntry(stream),), length, seed)
        return
    train = TrainingSequences((TrainEntry(stream),), length, seed)
    assert train.num_sequences == (tokens - 1) // length
    rows = train.batch(np.arange(train.num_sequences))
    assert rows.dtype == np.int64
    assert rows.shape == (train.num_sequences, length + 1)
    assert np.array_equal(rows, rows[:, :1] + np.arange(length + 1))  # consecutive tokens
    assert sorted(rows[:, 1:].ravel()) == list(range(1001, 1001 + train.num_sequences * length))


def test_rows_depend_on_their_index_alone():
    entries = (
        TrainEntry(np.arange(1000, dtype=np.uint16), 3.0),
        TrainEntry(np.arange(50000, 50200, dtype=np.uint32), 1.0),
    )
    train = TrainingSequences(entries, 8, seed=4)
    whole = train.batch(np.arange(500))
    shuffled = np.random.default_rng(0).permutation(500)
    assert np.array_equal(train.batch(shuffled), whole[shuffled])
    for ranks in (2, 4):
        parts = [train.batch(np.arange(rank, 500, ranks)) for rank in range(ranks)]
        assert np.array_equal(np.stack(parts, axis=1).reshape(500, 9), whole)
    assert 100 < np.sum(whole[:, 0] >= 50000) < 150  # a quarter
    assert not np.array_equal(TrainingSequences(entries, 8, seed=5).batch(np.arange(500)), whole)
    assert train.batch(np.arange(0)).shape == (0, 9)


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(2, 100), length=st.integers(1, 20))
def test_held_out_text_is_predicted_once_and_padded(tokens, length):
    stream = np.arange(1000, 1000 + tokens)
    held_out = held_out_of(stream, length)
    assert held_out.num_tokens == tokens - 1
    assert held_out.num_sequences == int(np.ceil((tokens - 1) / length))
    inputs, targets = held_out.batch(np.arange(held_out.num_sequences + 2))  # two rows of padding
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.shape == targets.shape == (held_out.num_sequences + 2, length)
    real = targets != -100
    assert targets[real].tolist() == stream[1:].tolist()
    assert inputs[real].tolist() == stream[:-1].tolist()
    assert np.all(inputs[~real] == 256)
    assert not real[-2:].any()


def token_cache(held_out, num_bytes, reference):
    tokens = np.array(held_out, np.uint16)
    size = StreamSize(len(tokens), int(np.sum(tokens == 256)) - 1 if held_out else 0, num_bytes)
    return TokenCache(Path("x"), tokens, tokens, size, size, reference)


def test_held_out_texts_of_a_mixture_are_joined_at_their_marks():
    caches = [
        token_cache([256, 1, 2, 256], 2, {"xz -9": 4.0}),
        token_cache([], 0, {}),
        token_cache([256, 3, 256, 4, 5, 6, 7, 8, 256], 6, {"xz -9": 2.0}),
    ]
    joined = join_held_out(caches, 4, 256)
    assert joined.tokens.tolist() == [256, 1, 2, 256, 3, 256, 4, 5, 6, 7, 8, 256]
    assert (joined.num_bytes, joined.num_documents, joined.num_tokens) == (8, 3, 11)
    assert joined.reference_bits_per_byte == {"xz -9": 2.5}  # (4 * 2 + 2 * 6) / 8
    assert join_held_out(caches[1:2], 4, 256) is None


def test_a_mark_belongs_to_the_document_behind_it():
    tokens = np.array([[256, 1, 2, 256, 3], [1, 2, 256, 256, 4]])
    assert document_ids(tokens, 256).tolist() == [[1, 1, 1, 2, 2], [0, 0, 1, 2, 2]]
    assert document_ids(tokens, 256).dtype == np.int64
