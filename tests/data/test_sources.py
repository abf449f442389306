"""Corpora: their documents, what is held out, and their fingerprints."""

import os

import pytest

from moe_train.config.data import MixtureEntry
from moe_train.config.errors import UsageError
from moe_train.data.corpus import Document, HeldOutSplit
from moe_train.data.digests import file_digests
from moe_train.data.sources import check_source, open_corpus
from tests.data.conftest import make_documents


def documents(config, index=0):
    return list(open_corpus(config.sources[index], config, "data").documents())


def fingerprint(config, tmp_path):
    corpus = open_corpus(config.sources[0], config, "data")
    return corpus.fingerprint(lambda files: file_digests(files, tmp_path / "digests", 0.0))


def test_a_fraction_of_the_documents_is_held_out_by_name(write_files, make_config):
    files = make_documents(400)
    config = make_config(source="text", paths=[str(write_files(files))], validation_fraction=0.25)
    found = documents(config)
    assert [(d.name, d.text) for d in found] == sorted(files.items())
    assert 60 < sum(d.held_out for d in found) < 140  # 100 expected; 4.6 standard deviations of 8.7
    held_out = {d.name for d in found if d.held_out}
    assert held_out == {d.name for d in documents(config) if d.held_out}
    # Other documents do not change on which side one is.
    os.remove(write_files(files) / "doc000.txt")
    assert {d.name for d in documents(config) if d.held_out} == held_out - {"doc000.txt"}


def test_the_bound_of_the_held_out_text_holds_in_document_order():
    texts = [(str(i), "ß" * (50 + 500 * (i % 3 == 0))) for i in range(200)]
    unbounded = [d.held_out for d in HeldOutSplit(0.5, 10**9).documents(texts)]
    bounded = list(HeldOutSplit(0.5, 1050).documents(texts))  # room for ten of 100 bytes, for none of 1100
    first_ten = [i for i, held_out in enumerate(unbounded) if held_out and i % 3][:10]
    assert [i for i, d in enumerate(bounded) if d.held_out] == first_ten
    assert [(d.name, d.text) for d in bounded] == texts  # those beyond the bound are there to train on


def test_nothing_is_held_out_at_fraction_zero(write_files, make_config):
    config = make_config(source="text", paths=[str(write_files(make_documents(50)))], validation_fraction=0.0)
    assert not any(d.held_out for d in documents(config))


def test_named_files_are_held_out_and_not_trained_on(write_files, make_config):
    folder = write_files({"a.txt": "a", "b.txt": "b", "valid/c.txt": "c"})
    config = make_config(source="text", paths=[str(folder)], validation_paths=[str(folder / "valid")])
    assert documents(config) == [
        Document("a.txt", "a", False),
        Document("b.txt", "b", False),
        Document("c.txt", "c", True),
    ]
    config = make_config(source="text", paths=[str(folder)], validation_paths=[f"{folder}/**/*.txt"])
    with pytest.raises(UsageError, match=r"data\.paths .*every file is held out by data\.validation_paths"):
        documents(config)


def test_rows_are_split_one_by_one(write_files, make_config):
    lines = "".join(f'{{"body": "row {i}"}}\n' for i in range(100))
    folder = write_files({"a.jsonl": lines})
    config = make_config(source="jsonl", paths=[f"{folder}/*.jsonl"], text_column="body", validation_fraction=0.5)
    found = documents(config)
    assert [d.text for d in found] == [f"row {i}" for i in range(100)]
    assert 25 < sum(d.held_out for d in found) < 75


def test_the_fingerprint_follows_contents_names_and_settings_only(write_files, make_config, tmp_path):
    folder = write_files(make_documents(5))
    fields = {"source": "text", "paths": [str(folder)]}
    first = fingerprint(make_config(**fields), tmp_path)

    os.utime(folder / "doc001.txt", (1e9, 1e9))
    assert fingerprint(make_config(**fields), tmp_path) == first  # touched, not changed
    moved = folder.rename(folder.with_name("moved"))
    assert fingerprint(make_config(source="text", paths=[str(moved)]), tmp_path) == first
    moved.rename(folder)

    others = [make_config(**fields, validation_fraction=0.1), make_config(**fields, validation_max_bytes=5)]
    others.append(make_config(**fields, validation_paths=[str(folder / "doc000.txt")]))
    seen = {first, *(fingerprint(config, tmp_path) for config in others)}
    (folder / "doc001.txt").write_text("changed")
    seen.add(fingerprint(make_config(**fields), tmp_path))
    (folder / "doc001.txt").rename(folder / "other.txt")
    seen.add(fingerprint(make_config(**fields), tmp_path))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "huggingface", "name": "./not-there"}, r"data\.name \('\./not-there'\): no such folder"),
        (
            {"source": "huggingface", "name": "x/y", "split": "test", "validation_split": "test"},
            r"data\.validation_split \('test'\) is data\.split",
        ),
        ({"source": "text", "paths": ("/not/there",)}, r"data\.paths \('/not/there'\): no such file"),
        (
            {"source": "parquet", "paths": (__file__,), "validation_paths": ("/not/*.parquet",)},
            r"data\.validation_paths \('/not/\*\.parquet'\): the pattern matches no file",
        ),
    ],
)
def test_the_quick_check_names_what_is_not_there(fields, message):
    with pytest.raises(UsageError, match=message):
        check_source(MixtureEntry(**fields), "data")


def test_the_standard_library_has_utf8_documents_only(make_config):
    found = documents(make_config())
    names = [d.name for d in found]
    assert "test/encoded_modules/module_koi8_r.py" not in names
    assert len(names) > 500
    assert 0.005 < sum(d.held_out for d in found) / len(found) < 0.05
