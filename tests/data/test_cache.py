"""Cache folders: what is opened, what is rebuilt, and what a change of contents or settings does."""

import itertools
import json

import numpy as np
import pytest

from moe_train.config.errors import UsageError
from moe_train.data import cache as cache_module
from moe_train.data.cache import CacheFolder, open_token_cache
from moe_train.data.sources import open_corpus
from moe_train.data.tokenizers import ByteTokenizer
from tests.data.conftest import make_documents


@pytest.fixture
def builds(monkeypatch):
    """Descriptions of the corpora that are tokenized."""
    found: list[str] = []
    tokenize = cache_module.tokenize_corpus

    def recorded(corpus, *arguments):
        found.append(corpus.description)
        return tokenize(corpus, *arguments)

    monkeypatch.setattr(cache_module, "tokenize_corpus", recorded)
    return found


@pytest.fixture
def tokenized(write_files, make_config, tmp_path):
    """Tokenizes the test's corpus; returns the open cache."""
    folder = write_files(make_documents(20))

    def run():
        config = make_config(source="text", paths=[str(folder)], validation_fraction=0.3)
        caches = CacheFolder(tmp_path / "cache", 0.0, False)
        corpus = open_corpus(config.sources[0], config, "data")
        return caches.tokens(corpus, corpus.fingerprint(caches.digest_files), ByteTokenizer())

    return run


def test_documents_come_back_whole_from_the_right_stream(tokenized):
    cache = tokenized()
    documents = make_documents(20)
    decode = ByteTokenizer().decode
    found = []
    for tokens, size in ((cache.train_tokens, cache.train), (cache.held_out_tokens, cache.held_out)):
        assert isinstance(tokens, np.memmap)
        assert (tokens[0], tokens[-1], len(tokens)) == (256, 256, size.tokens)
        marks = np.flatnonzero(tokens == 256)
        texts = [decode(tokens[a:b]) for a, b in itertools.pairwise(marks)]
        assert len(texts) == size.documents > 0
        assert sum(len(text.encode()) for text in texts) == size.num_bytes
        found += texts
    assert sorted(found) == sorted(documents.values())


def test_a_cache_is_built_once_and_described(tokenized, builds):
    first, second = tokenized(), tokenized()
    assert len(builds) == 1
    assert first.folder == second.folder
    assert np.array_equal(first.train_tokens, second.train_tokens)
    meta = json.loads((first.folder / "meta.json").read_text())
    assert meta["dtype"] == "uint16"
    assert meta["train"] == {
        "tokens": first.train.tokens,
        "documents": first.train.documents,
        "num_bytes": first.train.num_bytes,
        "unrecovered": {"documents": 0, "num_bytes": 0},
    }
    assert meta["reference_bits_per_byte"] == first.reference_bits_per_byte


def cut_short(folder):
    path = folder / "train.tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])


def lose_a_file(folder):
    (folder / "held_out.tokens.bin").unlink()


def damage_meta(folder):
    (folder / "meta.json").write_text('{"format_version": 1')


def age_format(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 0}))


@pytest.mark.parametrize("damage", [cut_short, lose_a_file, damage_meta, age_format])
def test_a_damaged_cache_is_rebuilt(tokenized, builds, damage):
    expected = np.array(tokenized().train_tokens)
    folder = tokenized().folder
    damage(folder)
    assert open_token_cache(folder) is None
    again = tokenized()
    assert len(builds) == 2
    assert np.array_equal(again.train_tokens, expected)
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder.name]


def test_a_failed_build_leaves_no_cache(tokenized, write_files, tmp_path):
    folder = write_files({"zzz.txt": b"\xff"})
    with pytest.raises(UsageError, match=r"zzz\.txt: not UTF-8 at byte 0"):
        tokenized()
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()] == []
    (folder / "zzz.txt").write_text("mended")
    assert tokenized().train.documents + tokenized().held_out.documents == 21


def test_a_corpus_that_changes_meanwhile_is_not_cached(tokenized, write_files, tmp_path, monkeypatch):
    folder = write_files({})
    tokenize = cache_module.tokenize_corpus

    def slow(corpus, *arguments):
        result = tokenize(corpus, *arguments)
        (folder / "doc000.txt").write_text("written late")
        return result

    monkeypatch.setattr(cache_module, "tokenize_corpus", slow)
    with pytest.raises(UsageError, match=r"data\.paths .*: changed while it was read"):
        tokenized()
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]
