"""Hugging Face data sets from local folders: saved ones and folders of data files. No network."""

import itertools
import json
import os

import numpy as np
import pytest

from moe_train.config.errors import UsageError
from moe_train.data import check_data, prepare_data
from moe_train.data.digests import read_digests
from moe_train.data.sources import open_corpus

datasets = pytest.importorskip("datasets")

TEXTS = [f"row {i} of the data set" for i in range(40)]


@pytest.fixture(autouse=True)
def own_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.fixture
def saved(tmp_path):
    """A data set of two splits in the form of save_to_disk."""
    train = datasets.Dataset.from_dict({"id": list(range(40)), "body": TEXTS})
    test = datasets.Dataset.from_dict({"id": [0], "body": ["held out"]})
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def read(config):
    corpus = open_corpus(config.sources[0], config, "data")
    return [(d.name, d.text, d.held_out) for d in corpus.documents()], corpus.fingerprint(read_digests)


def hub_config(make_config, folder, **fields):
    return make_config(source="huggingface", name=str(folder), text_column="body", **fields)


def test_saved_splits(make_config, saved):
    found, key = read(hub_config(make_config, saved, validation_split="test"))
    assert found == [(str(i), text, False) for i, text in enumerate(TEXTS)] + [("0", "held out", True)]
    assert read(hub_config(make_config, saved, validation_split="test"))[1] == key
    assert read(hub_config(make_config, saved, validation_fraction=0.0))[1] != key


def test_one_saved_data_set_is_split_by_row(make_config, tmp_path):
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "one")
    found, key = read(hub_config(make_config, tmp_path / "one", validation_fraction=0.5))
    assert [text for _, text, _ in found] == TEXTS
    assert 5 < sum(held_out for *_, held_out in found) < 35
    datasets.Dataset.from_dict({"body": [*TEXTS[:-1], "changed"]}).save_to_disk(tmp_path / "two")
    assert read(hub_config(make_config, tmp_path / "two", validation_fraction=0.5))[1] != key


def test_a_folder_of_data_files(make_config, write_files):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    folder = write_files({"train.jsonl": lines, "test.jsonl": '{"body": "held out"}\n'})
    config = hub_config(make_config, folder, validation_split="test")
    found, key = read(config)
    assert found == [(str(i), text, False) for i, text in enumerate(TEXTS)] + [("0", "held out", True)]
    assert read(config)[1] == key


def test_a_folder_that_changes_is_loaded_anew_though_size_and_time_stay(make_config, write_files):
    folder = write_files({"train.jsonl": '{"body": "one"}\n{"body": "two"}\n'})
    config, status = hub_config(make_config, folder, validation_fraction=0.0), (folder / "train.jsonl").stat()
    found, key = read(config)
    assert [text for _, text, _ in found] == ["one", "two"]
    os.utime(folder / "train.jsonl", (1e9, 1e9))
    assert read(config)[1] == key  # touched, not changed
    (folder / "train.jsonl").write_text('{"body": "ONE"}\n{"body": "two"}\n')
    os.utime(folder / "train.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    found, changed = read(config)
    assert [text for _, text, _ in found] == ["ONE", "two"]
    assert changed != key


@pytest.mark.parametrize("held_out", ["train[:20%]", "train[5:13]", "train[-8:]", "train[:4]+train[-4:]"])
def test_rows_of_a_slice_are_held_out_and_not_trained_on(make_config, write_files, held_out, capfd):
    folder = write_files({"train.jsonl": "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)})
    data = prepare_data(
        hub_config(make_config, folder, validation_split=held_out), sequence_length=8, seed=0, min_sequences=4
    )
    texts = [set(rows(tokens)) for tokens in (data.train.entries[0].tokens, data.held_out.tokens)]
    assert [len(found) for found in texts] == [32, 8]
    assert texts[0] | texts[1] == set(TEXTS)
    assert "8 of 40 documents to train on are left out: the same text is held out" in capfd.readouterr().err


def rows(tokens):
    """Texts of a stream of bytes."""
    marks = np.flatnonzero(tokens == 256)
    return [bytes(tokens[a + 1 : b].tolist()).decode() for a, b in itertools.pairwise(marks)]


def test_a_slice_that_is_everything_leaves_nothing_to_train_on(make_config, write_files):
    folder = write_files({"train.jsonl": "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)})
    config = hub_config(make_config, folder, validation_split="train[:100%]")
    with pytest.raises(UsageError, match=r"has 0 sequences .* 40 are left out because the same text is held out"):
        prepare_data(config, sequence_length=8, seed=0, min_sequences=4)


def test_prepared_from_a_saved_data_set(make_config, saved):
    config = hub_config(make_config, saved, validation_split="test")
    check_data(config)
    data = prepare_data(config, sequence_length=16, seed=0, min_sequences=4)
    tokens = data.train.entries[0].tokens
    assert data.tokenizer.decode(tokens) == "".join(TEXTS)
    assert data.tokenizer.decode(data.held_out.tokens) == "held out"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "dev"}, r"data\.split \('dev'\): .* has no such split; it has train, test"),
        ({"validation_split": "dev"}, r"data\.validation_split \('dev'\): .* has no such split"),
        ({"text_column": "text"}, r"data\.name .*: no column 'text' \(text_column\); the columns are body, id"),
        ({"subset": "en"}, r"data\.subset \('en'\) has no effect"),
        ({"text_column": "id"}, r"row 0: column 'id' is int, not a string"),
    ],
)
def test_what_a_saved_data_set_lacks_is_named(make_config, saved, fields, message):
    with pytest.raises(UsageError, match=message):
        read(make_config(**{"source": "huggingface", "name": str(saved), "text_column": "body", **fields}))


def test_a_data_set_that_cannot_be_loaded_is_named(make_config, write_files):
    folder = write_files({"notes.xyz": "nothing that is data"})
    with pytest.raises(UsageError, match=rf"data\.name \('{folder}'\), data\.split \('train'\): cannot be loaded: \S+"):
        read(make_config(source="huggingface", name=str(folder)))
