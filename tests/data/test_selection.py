"""Held-out text is never trained on, over all sources of a run, and every document is accounted for."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.config.data import DataConfig
from moe_train.config.errors import UsageError
from moe_train.data import ByteTokenizer, open_domains, prepare, prepare_data
from moe_train.data.cache import CacheFolder, open_token_cache
from moe_train.data.index import InnerCut, text_hash
from moe_train.data.prepare import open_corpora

FILES = [f"{i}.jsonl" for i in range(4)]


def texts_of(tokens: np.ndarray) -> list[str]:
    marks = np.flatnonzero(tokens == 256)
    return [ByteTokenizer().decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(marks)]


def prepared(config: DataConfig):
    return prepare_data(config, sequence_length=1, seed=0, min_sequences=1)


def write_rows(folder: Path, name: str, texts: list[str]) -> None:
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@st.composite
def corpora_and_mixtures(draw: st.DrawFn) -> tuple[list[list[str]], dict[str, object]]:
    """Rows of a few files, with copies between them, and entries that name the same files more than once."""
    text = st.sampled_from([f"text number {i}" for i in range(25)]) | st.text("ab \n", max_size=6)
    rows = draw(st.lists(st.lists(text, min_size=1, max_size=12), min_size=len(FILES), max_size=len(FILES)))
    names = st.lists(st.sampled_from(FILES), min_size=1, max_size=3, unique=True)
    entries = [
        {"paths": draw(names), "validation_paths": draw(st.just([]) | names)} for _ in range(draw(st.integers(1, 3)))
    ]
    fields = {
        "mixture": entries,
        "validation_fraction": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "validation_max_bytes": draw(st.sampled_from([30, 10**6])),
    }
    return rows, fields


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=corpora_and_mixtures())
def test_no_held_out_text_is_trained_on_and_no_document_is_lost(tmp_path_factory, drawn):
    check_selection(tmp_path_factory.mktemp("corpus"), *drawn)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=corpora_and_mixtures())
def test_the_same_of_many_more_mixtures(tmp_path_factory, drawn):
    check_selection(tmp_path_factory.mktemp("corpus"), *drawn)


def check_selection(folder: Path, rows: list[list[str]], fields: dict) -> None:
    for name, texts in zip(FILES, rows, strict=True):
        write_rows(folder, name, texts)
    entries = [
        {"source": "jsonl", **{key: [str(folder / name) for name in names] for key, names in entry.items()}}
        for entry in fields["mixture"]
    ]
    config = DataConfig(**{**fields, "mixture": entries, "cache_dir": str(folder / "cache")})
    cache = CacheFolder(folder / "cache", 0.0, False)
    try:
        selected, fingerprints = open_corpora(config, cache)
    except UsageError as error:
        assert "nothing is left to train on" in str(error)
        return
    opened = [cache.tokens(corpus, mark, ByteTokenizer()) for corpus, mark in zip(selected, fingerprints, strict=True)]
    held_out = {text_hash(text) for each in opened for text in texts_of(each.held_out_tokens)} - {text_hash("")}
    for entry, corpus, tokens in zip(fields["mixture"], selected, opened, strict=True):
        trained, aside = texts_of(tokens.train_tokens), texts_of(tokens.held_out_tokens)
        assert not held_out & {text_hash(text) for text in trained}
        files = dict.fromkeys([*entry["paths"], *entry["validation_paths"]])
        documents = [text for name in files for text in rows[FILES.index(name)]]
        if (cut := corpus.index.cut) is not None:
            whole = documents[cut.document]
            documents[cut.document : cut.document + 1] = [whole[: cut.characters], whole[cut.characters :]]
        assert not Counter(trained + aside) - Counter(documents)
        assert len(documents) - len(trained + aside) == corpus.num_left_out


@pytest.fixture
def rows(tmp_path):
    """Writes rows of text into a file, and returns its path."""

    def write(name: str, texts: list[str]) -> str:
        write_rows(tmp_path, name, texts)
        return str(tmp_path / name)

    return write


WORDS = [f"a document of words, number {i}" for i in range(40)]


def both_sides(config: DataConfig) -> tuple[list[str], list[str]]:
    data = prepared(config)
    trained = [text for entry in data.train.entries for text in texts_of(entry.tokens)]
    return trained, texts_of(data.held_out.tokens)


def test_copies_in_another_file_of_another_kind_are_left_out(make_config, rows, tmp_path, capfd):
    one = rows("one.jsonl", WORDS)
    (tmp_path / "copies").mkdir()
    for i in range(0, 40, 4):
        (tmp_path / "copies" / f"{i}.txt").write_text(f"\ufeff{WORDS[i]}\r\n")
    (tmp_path / "copies" / "other.txt").write_text("a text of its own")
    mixture = [
        {"source": "text", "paths": [str(tmp_path / "copies")]},
        {"source": "jsonl", "paths": [rows("two.jsonl", ["others"] * 3)], "validation_paths": [one]},
    ]
    trained, held_out = both_sides(make_config(mixture=mixture, validation_fraction=0.0))
    assert sorted(held_out) == sorted(WORDS)
    assert sorted(set(trained)) == ["a text of its own", "others"]
    said = capfd.readouterr().err
    assert "data.mixture[0].paths" in said
    assert "10 of 11 documents to train on are left out: the same text is held out" in said


def test_a_file_that_one_entry_trains_on_and_another_validates_on(make_config, rows):
    one, two = rows("one.jsonl", WORDS), rows("two.jsonl", [*WORDS[:5], "more"])
    mixture = [
        {"source": "jsonl", "paths": [one]},
        {"source": "jsonl", "paths": [rows("three.jsonl", ["third"])], "validation_paths": [two]},
    ]
    trained, held_out = both_sides(make_config(mixture=mixture, validation_fraction=0.0))
    assert sorted(trained) == sorted([*WORDS[5:], "third"])
    assert held_out == [*WORDS[:5], "more"]
    mixture[0]["paths"] = [two]
    with pytest.raises(UsageError, match=r"mixture\[0\].* has 0 sequences .* 6 are left out because the same text is"):
        prepared(make_config(mixture=mixture, validation_fraction=0.0))


def test_the_same_file_twice_has_the_same_rows_held_out(make_config, rows):
    one = rows("one.jsonl", WORDS)
    mixture = [{"source": "jsonl", "paths": [one]}, {"source": "jsonl", "paths": [rows("b.jsonl", ["b"]), one]}]
    trained, held_out = both_sides(make_config(mixture=mixture, validation_fraction=0.3))
    assert 5 < len(set(held_out)) < 25
    assert not set(trained) & set(held_out)
    assert set(trained) | set(held_out) == {*WORDS, "b"}


def test_repeated_documents_of_one_source_are_on_one_side(make_config, rows):
    trained, held_out = both_sides(
        make_config(source="jsonl", paths=[rows("one.jsonl", WORDS * 3)], validation_fraction=0.1)
    )
    assert held_out
    assert not set(trained) & set(held_out)
    assert len(trained) == 3 * len(set(trained))  # text that is not held out is repeated as it was given


def test_held_out_copies_train_no_tokenizer(make_config, rows, monkeypatch):
    seen: list[str] = []
    train_bpe = prepare.train_bpe

    def recorded(texts, *rest):
        seen.extend(texts)
        train_bpe(seen, *rest)

    monkeypatch.setattr(prepare, "train_bpe", recorded)
    config = make_config(
        source="jsonl",
        paths=[rows("one.jsonl", WORDS)],
        validation_paths=[rows("two.jsonl", WORDS[:10])],
        tokenizer="bpe",
        bpe_vocab_size=300,
    )
    prepared(config)
    assert seen == WORDS[10:]


@pytest.mark.parametrize(
    ("fraction", "max_bytes", "share"), [(0.02, 10**6, 0.02), (0.5, 10**6, 0.5), (0.9, 10**6, 0.5), (0.3, 1000, 0.02)]
)
def test_the_end_of_a_single_document_is_held_out(make_config, tmp_path, fraction, max_bytes, share, capfd):
    book = "it was a bright cold day and the Größe was 日本語\n" * 1000
    (tmp_path / "book.txt").write_text(book)
    fields = {"source": "text", "paths": [str(tmp_path / "book.txt")], "validation_max_bytes": max_bytes}
    (beginning,), (end,) = both_sides(make_config(**fields, validation_fraction=fraction))
    assert beginning + end == book
    assert beginning.endswith("\n")
    assert len(end.encode()) <= max_bytes
    assert abs(len(end) / len(book) - share) < 0.005
    assert "no whole document can be held out: the end of its longest document is" in capfd.readouterr().err


def test_a_few_documents_of_which_none_is_picked_hold_out_the_end_of_the_longest(make_config, rows):
    texts = ["short one", "x" * 500, "short two"]
    trained, held_out = both_sides(make_config(source="jsonl", paths=[rows("a.jsonl", texts)]))
    assert trained == ["short one", "x" * 490, "short two"]
    assert held_out == ["x" * 10]


def test_a_parquet_file_of_one_row_and_a_copy_of_it_elsewhere(make_config, rows, tmp_path):
    import pyarrow
    from pyarrow import parquet

    long = "".join(f"sentence {i}. " for i in range(500))
    parquet.write_table(pyarrow.table({"text": [long]}), tmp_path / "one.parquet")
    mixture = [
        {"source": "parquet", "paths": [str(tmp_path / "one.parquet")]},
        {"source": "jsonl", "paths": [rows("copy.jsonl", [long, *WORDS])]},
    ]
    trained, held_out = both_sides(make_config(mixture=mixture, validation_fraction=0.1))
    end = next(text for text in held_out if text in long)
    assert long[: -len(end)] in trained
    assert not any(end in text for text in trained)


def test_copies_of_one_text_are_one_document_whose_end_is_held_out(make_config, rows):
    text = "the only text there is\n" * 20
    config = make_config(source="jsonl", paths=[rows("a.jsonl", [text] * 20)], validation_fraction=0.3)
    (beginning,), (end,) = both_sides(config)
    assert beginning + end == text


def test_nothing_is_cut_where_nothing_is_to_be_held_out(make_config, tmp_path):
    (tmp_path / "book.txt").write_text("words " * 100)
    fields = {"source": "text", "paths": [str(tmp_path / "book.txt")]}
    assert prepared(make_config(**fields, validation_fraction=0.0)).held_out is None
    (tmp_path / "v.txt").write_text("held out")
    data = prepared(make_config(**fields, validation_paths=[str(tmp_path / "v.txt")]))
    assert texts_of(data.train.entries[0].tokens) == ["words " * 100]


def test_all_the_text_of_a_source_is_there_to_evaluate_whole(make_config, rows, tmp_path):
    (tmp_path / "book.txt").write_text("words " * 100)
    mixture = [
        {"source": "text", "paths": [str(tmp_path / "book.txt")]},
        {"source": "jsonl", "paths": [rows("a.jsonl", [*WORDS, *WORDS])]},
    ]
    config = make_config(mixture=mixture, validation_fraction=0.1)
    domains = open_domains(config, ByteTokenizer(), sequence_length=8, split="all")
    assert [sorted(texts_of(domain.text.tokens)) for domain in domains] == [["words " * 100], sorted(WORDS * 2)]


def test_a_cut_gives_back_the_document():
    from moe_train.data.corpus import Document

    documents = [Document("a", "one", True), Document("b", "two three", True)]
    parts = list(InnerCut(1, 4, 0).documents(documents))
    assert [(part.text, part.held_out) for part in parts] == [("one", False), ("two ", False), ("three", True)]


def test_an_index_that_is_damaged_is_made_again(make_config, rows, tmp_path):
    config = make_config(source="jsonl", paths=[rows("a.jsonl", WORDS)], validation_fraction=0.3)
    expected = both_sides(config)
    (folder,) = (path for path in (tmp_path / "cache" / "documents").iterdir() if path.is_dir())
    for name in ("meta.json", "hashes.npy", "held_out.npy"):
        os.truncate(folder / name, 7)
        assert both_sides(config) == expected
    assert open_token_cache(prepared(config).cache_dirs[0]) is not None
