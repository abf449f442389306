"""Remembered digests: right after every change, and nothing read twice without one."""

import hashlib
import os

import pytest

from moe_train.config.errors import UsageError
from moe_train.data import digests
from moe_train.data.digests import digest_of, file_digests
from moe_train.data.files import CorpusFile


@pytest.fixture
def reads(monkeypatch):
    """Names of the files whose contents are read, in order; files written just now are trusted."""
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0)
    names: list[str] = []
    read = digests._digest_file

    def recorded(path: str) -> str:
        names.append(os.path.basename(path))
        return read(path)

    monkeypatch.setattr(digests, "_digest_file", recorded)
    return names


@pytest.fixture
def corpus(write_files):
    folder = write_files({"a.txt": "one", "b.txt": "two", "c.txt": "three"})
    return [CorpusFile(folder / name, name) for name in ("a.txt", "b.txt", "c.txt")]


def test_digests_are_those_of_the_contents(corpus, tmp_path):
    expected = [hashlib.blake2b(text, digest_size=16).hexdigest() for text in (b"one", b"two", b"three")]
    assert file_digests(corpus, tmp_path / "digests", 0.0) == expected


def test_an_unchanged_corpus_is_not_read_again(corpus, tmp_path, reads):
    first = file_digests(corpus, tmp_path / "digests", 0.0)
    assert reads == ["a.txt", "b.txt", "c.txt"]
    assert file_digests(corpus, tmp_path / "digests", 0.0) == first
    assert reads == ["a.txt", "b.txt", "c.txt"]


def test_only_what_changed_is_read(corpus, tmp_path, reads):
    first = file_digests(corpus, tmp_path / "digests", 0.0)
    reads.clear()
    corpus[1].path.write_text("TWO")  # the same size
    second = file_digests(corpus, tmp_path / "digests", 0.0)
    assert reads == ["b.txt"]
    assert [x == y for x, y in zip(first, second, strict=True)] == [True, False, True]


def put_back(path, status):
    """Give a file the times that it had, as rsync, tar and cp -p do."""
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def overwrite(path):
    path.write_text("TWO")


def overwrite_in_place(path):
    with open(path, "r+b") as file:
        file.write(b"T")


def replace(path):
    new = path.with_name("new")
    new.write_text("TWO")
    new.replace(path)


def swap_in_a_link(path):
    other = path.with_name("other")
    other.write_text("TWO")
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("change", [overwrite, overwrite_in_place, replace, swap_in_a_link])
def test_the_same_size_and_time_prove_nothing(corpus, tmp_path, reads, change):
    path = corpus[1].path
    first, status = file_digests(corpus, tmp_path / "digests", 0.0), path.stat()
    assert file_digests(corpus, tmp_path / "digests", 0.0) == first
    reads.clear()
    change(path)
    put_back(path, status)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert file_digests(corpus, tmp_path / "digests", 0.0)[1] != first[1]
    assert reads == ["b.txt"]


def test_a_file_written_just_now_is_not_trusted(corpus, tmp_path):
    """A second write within one tick of the clock would leave size and time as they were."""
    corpus[1].path.write_text("new")
    status = corpus[1].path.stat()
    first = file_digests(corpus, tmp_path / "digests", 0.0)
    corpus[1].path.write_text("NEW")
    os.utime(corpus[1].path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digests(corpus, tmp_path / "digests", 0.0)[1] != first[1]


def test_a_damaged_memory_is_written_anew(corpus, tmp_path, reads):
    first = file_digests(corpus, tmp_path / "digests", 0.0)
    for damage in ("", "[1]", '{"x": 3}', "{"):
        (memory,) = (tmp_path / "digests").glob("*.json")
        memory.write_text(damage)
        reads.clear()
        assert file_digests(corpus, tmp_path / "digests", 0.0) == first
        assert reads == ["a.txt", "b.txt", "c.txt"]


def test_a_file_that_is_gone_is_named(corpus, tmp_path):
    corpus[2].path.unlink()
    with pytest.raises(UsageError, match=r"c\.txt: cannot be read: No such file"):
        file_digests(corpus, tmp_path / "digests", 0.0)


def test_keys_differ_with_every_value():
    values = [["a", "b"], ["ab"], ["a", ["b"]], ["a", None], ["a", 1], ["a", "1"], {"a": 1}]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
