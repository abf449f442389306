"""Patterns of file names: folders that match, brackets that exist, braces."""

from pathlib import Path

import pytest

from moe_train.config.errors import UsageError
from moe_train.data.files import SUFFIXES, find_files


@pytest.fixture
def folder(write_files, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ("s/part-0/a", "s/part-1/b", "s/part-1/deep/c", "data [v2]/d", "x{1}/e", "w/set [a]/f", "w/set b/g", "[0]")
    files = {f"{name}.txt": name for name in names}
    root = write_files(files | {"s/part-1/b.dat": "no text", "s/.part-2/h.txt": "hidden"})
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s/part-*", ["part-0/a.txt", "part-1/b.txt", "part-1/deep/c.txt"]),
        ("s/*", ["part-0/a.txt", "part-1/b.txt", "part-1/deep/c.txt"]),
        ("*/part-?", ["s/part-0/a.txt", "s/part-1/b.txt", "s/part-1/deep/c.txt"]),
        ("s/**", ["part-0/a.txt", "part-1/b.dat", "part-1/b.txt", "part-1/deep/c.txt"]),
        ("s/**/deep", ["part-1/deep/c.txt"]),
        ("s/part-{0,1}/*.txt", ["part-0/a.txt", "part-1/b.txt"]),
        ("s/part-{0..1}", ["part-0/a.txt", "part-1/b.txt", "part-1/deep/c.txt"]),
        ("{s/part-0,data [[]v2]}/*.txt", ["data [v2]/d.txt", "s/part-0/a.txt"]),
        ("data [v2]/*.txt", ["d.txt"]),
        ("data [v2]", ["d.txt"]),
        ("./data [v2]/d.*", ["d.txt"]),
        ("*/set [a]/*.txt", ["w/set [a]/f.txt"]),
        ("w/set [b]/*", ["set b/g.txt"]),
        ("x{1}/*.txt", ["e.txt"]),
        ("[0].txt", ["[0].txt"]),
    ],
)
def test_what_a_pattern_names(folder: Path, pattern: str, names: list[str]) -> None:
    for prefix in ("", f"{folder}/"):
        if prefix and pattern.startswith("{"):
            continue
        assert [file.name for file in find_files([prefix + pattern], SUFFIXES["text"], "data.paths").files] == names


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("s/part-{0,2}/*.txt", "nothing is there for 's/part-2/*.txt'"),
        ("s/part-{0,1/*.txt", "a brace is not closed"),
        ("s/part-[23]", "the pattern matches no file"),
        ("$DATA/x.txt", "$DATA is not replaced here"),
        ("s/${oc.env:DATA}/*.txt", "${oc.env:DATA} is not replaced here"),
        ("s/none", "no such file or folder"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, pattern: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_files([pattern], SUFFIXES["text"], "data.mixture[0].paths")
    assert str(caught.value).startswith(f"data.mixture[0].paths ({pattern!r}): ") and reason in str(caught.value)
