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


def test_linked_folders_of_a_data_set_are_part_of_its_contents(make_config, write_files, tmp_path):
    names_the_link = "---\nconfigs: [{config_name: default, data_files: ['*.jsonl', 'linked/*.jsonl']}]\n---\n"
    folder, outside = write_files({"train.jsonl": '{"body": "one"}\n', ".hidden.jsonl": "x"}), tmp_path / "outside"
    outside.mkdir()
    (outside / "more.jsonl").write_text('{"body": "two"}\n')
    (folder / "linked").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    config = hub_config(make_config, folder, validation_fraction=0.0)
    corpus = open_corpus(config.sources[0], config, "data")
    assert [file.name for file in corpus.local_files] == ["linked/more.jsonl", "train.jsonl"]
    account, of_links = corpus.notes
    assert account.startswith(f"data.name ({folder}): 2 files watched for changes, 2 left out: ")
    assert "1 hidden (.hidden.jsonl)" in account and "1 folders reached twice (linked/back)" in account
    assert f"data.name ({folder}): `datasets` does not search folders that are links (linked): " in of_links
    assert [document.text for document in corpus.documents()] == ["one"]
    (folder / "README.md").write_text(names_the_link)
    found, key = read(config)
    assert {text for _, text, _ in found} == {"one", "two"}
    (outside / "more.jsonl").write_text('{"body": "TWO"}\n')
    found, changed = read(config)
    assert {text for _, text, _ in found} == {"one", "TWO"}
    assert changed != key


def test_a_split_that_is_a_link_is_read_and_watched(make_config, saved, tmp_path):
    (saved / "train").rename(tmp_path / "elsewhere")
    (saved / "train").symlink_to(tmp_path / "elsewhere")
    config = hub_config(make_config, saved, validation_split="test")
    corpus = open_corpus(config.sources[0], config, "data")
    assert "train/state.json" in [file.name for file in corpus.local_files]
    assert corpus.notes == ()


def test_a_name_that_no_folder_can_have_is_refused(make_config):
    for name in ("a" * 300, f"/{'a' * 300}"):
        config = hub_config(make_config, name)
        with pytest.raises(UsageError, match=r"data\.name \('.*(no such folder|cannot be loaded)"):
            check_data(config)
            read(config)


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
