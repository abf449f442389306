"""Synthetic tokens, and targets that are ignored."""

import numpy as np
import pytest

from moe_train.config.load import validate_config
from moe_train.data import IGNORED_TARGET, prepare_data
from moe_train.data.synthetic import synthetic_entry

LENGTH = 16


def sequences(ignored: float):
    config = validate_config({"train": {"run_dir": "r"}, "data": {"source": "synthetic", "ignored_targets": ignored}})
    data = prepare_data(config.data, sequence_length=LENGTH, seed=3, min_sequences=1)
    assert data.held_out is None and data.cache_dirs == ()
    return data.train


def test_targets_are_the_next_tokens() -> None:
    train = sequences(0.0)
    assert not train.ignores_targets
    inputs, targets = train.inputs_and_targets(np.arange(5))
    assert np.array_equal(inputs[:, 1:], targets[:, :-1]) and inputs.max() < 256
    assert train.num_targets(np.arange(5)) == 5 * LENGTH


def test_ignored_targets_are_counted_and_their_tokens_stay_inputs() -> None:
    train, plain = sequences(0.9), sequences(0.0)
    indices = np.arange(200)
    inputs, targets = train.inputs_and_targets(indices)
    whole = train.batch(indices)
    counts = (targets != IGNORED_TARGET).sum(1)
    assert np.array_equal(inputs, whole[:, :-1])
    assert np.array_equal(targets[targets != IGNORED_TARGET], whole[:, 1:][targets != IGNORED_TARGET])
    assert train.num_targets(indices) == counts.sum()
    assert [train.num_targets(indices[i : i + 1]) for i in range(9)] == counts[:9].tolist()
    assert counts.min() == 0 and counts.max() > 0.8 * LENGTH  # some sequence has none, some nearly all
    assert plain.num_targets(indices) == 200 * LENGTH


def test_one_sequence_of_eight_has_no_target_and_the_others_their_share() -> None:
    entry = synthetic_entry(LENGTH, 0.5)
    assert entry.is_target is not None and len(entry.is_target) == len(entry.tokens)
    shares = 1 - entry.is_target[1:].reshape(-1, LENGTH).mean(1)
    assert (shares[7::8] == 1).all()
    others = np.delete(shares, np.arange(7, len(shares), 8))
    assert others.mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"ignored_targets": 0.5}, "ignored_targets (0.5) has no effect"),
        ({"source": "synthetic", "tokenizer": "bpe"}, "tokenizer ('bpe') must be bytes"),
        ({"mixture": [{"source": "synthetic"}]}, "no part of a mixture"),
    ],
)
def test_what_makes_no_sense_is_refused(data, words) -> None:
    with pytest.raises(ValueError) as error:
        validate_config({"train": {"run_dir": "r"}, "data": data})
    assert words in str(error.value)
