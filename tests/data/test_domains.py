"""Text to evaluate on: the splits of each source, and what has no text."""

import numpy as np
import pytest

from moe_train.config.errors import UsageError
from moe_train.data import ByteTokenizer, open_domains
from moe_train.data.sequences import join_streams

BYTES = ByteTokenizer()
MARK = BYTES.end_of_document


def opened(config, split):
    return open_domains(config, BYTES, sequence_length=8, split=split)


def text_of(domain):
    return bytes(token for token in domain.text.tokens.tolist() if token != MARK).decode()


def test_every_split_of_every_source(write_files, make_config):
    folder = write_files({"a.txt": "aaaa", "b.txt": "bb", "c.txt": "ccc"})
    entries = [
        {"source": "text", "paths": [str(folder / "a.txt")], "validation_paths": [str(folder / "b.txt")]},
        {"source": "text", "paths": [str(folder / "c.txt")], "validation_paths": [str(folder / "b.txt")]},
    ]
    config = make_config(mixture=entries)
    expected = {"train": ["aaaa", "ccc"], "held_out": ["bb", "bb"], "all": ["aaaabb", "cccbb"]}
    for split, texts in expected.items():
        domains = opened(config, split)
        assert [text_of(domain) for domain in domains] == texts
        assert [domain.text.num_bytes for domain in domains] == [len(text) for text in texts]
        assert [domain.name for domain in domains] == [str(folder / "a.txt"), str(folder / "c.txt")]
        for domain in domains:  # each document has its mark before it and one behind the last
            assert (domain.text.tokens == MARK).sum() == domain.text.num_documents + 1
            assert bool(domain.text.reference_bits_per_byte) == (split == "held_out")


@pytest.mark.parametrize(("split", "text"), [("held_out", "aaaa"), ("train", ""), ("all", "")])
def test_a_source_without_text_is_named(write_files, make_config, split, text):
    folder = write_files({"a.txt": text})
    config = make_config(source="text", paths=[str(folder / "a.txt")], validation_fraction=0.0)
    with pytest.raises(UsageError, match=rf"a\.txt.*--split \({split}\)"):
        opened(config, split)


def test_streams_are_joined_with_one_mark_between_them():
    assert join_streams([]).tolist() == []
    one = np.array([9, 1, 9], dtype=np.uint16)
    assert join_streams([one]) is one
    assert join_streams([one, np.array([9, 2, 9]), np.array([9, 3, 4, 9])]).tolist() == [9, 1, 9, 2, 9, 3, 4, 9]


def test_a_random_source_has_no_text_to_measure(make_config):
    with pytest.raises(UsageError, match=r"data\.source \('synthetic'\) is random and has no text to measure"):
        opened(make_config(source="synthetic", paths=()), "held_out")
