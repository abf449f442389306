"""Patterns of file names: folders that match, brackets that exist, braces."""

from pathlib import Path

import pytest
from braceexpand import UnbalancedBracesError, braceexpand
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_train.config.errors import UsageError
from moe_train.data.files import SUFFIXES, check_files, find_files
from moe_train.data.patterns import _count_alternatives


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
        ("a" * 300, "no such file or folder"),
        (f"s/{'a' * 300}/*", "the pattern matches no file"),
        (f"s/part-0/{'a' * 300}*", "the pattern matches no file"),
        ("s/" * 3000, "no such file or folder"),
        ("s/{1..999999999}.txt", "its braces have 999,999,999 alternatives, more than 100,000: name the folder"),
        ("s/{0..999}{1..99..2}{a,{b,c{1..9}}}", "its braces have 550,000 alternatives, more than 100,000"),
        ("s/{1.." + "9" * 5000 + "}", "s/{1.."),
        ("s/" + "{a," * 5000 + "}" * 5000, "too many braces inside of each other"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, pattern: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_files([pattern], SUFFIXES["text"], "data.mixture[0].paths")
    start = f"data.mixture[0].paths ({pattern!r}): " if "inside" not in reason else "data.mixture[0].paths ("
    assert str(caught.value).startswith(start) and reason in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(
    parts=st.lists(
        st.sampled_from(
            [*"{},{},ab\\", "..", "{1..9}", "{09..01..3}", "{a..e}", "{a..e..2}", "{b}", "1", "{-3..2..0}"]
        ),
        max_size=10,
    )
)
@example(parts=["{a", "{1..3}", ",", "b\\,c", "}", "{x..}"])
@example(parts=["}", "{", "1..9", "}", "{"])
def test_alternatives_are_counted_before_they_are_listed(parts: list[str]) -> None:
    pattern = "".join(parts)
    try:
        listed = list(braceexpand(pattern))
    except UnbalancedBracesError:
        return
    assert _count_alternatives(pattern) == len(listed)


def test_two_stars_end_where_links_lead_back(write_files) -> None:
    root = write_files({"d/f.txt": "f", "d/a/g.txt": "g", "d/a/h.dat": "h", "d/.hidden/i.txt": "i", "d/.j.txt": "j"})
    for name in ("l1", "l2"):
        (root / "d" / name).symlink_to(".")
    (root / "d" / "lost").symlink_to("nowhere")
    expected = {
        "**": (["a/g.txt", "a/h.dat", "f.txt"], {"folders reached", "hidden", "hidden folders", "links that"}),
        "**/*.txt": (["a/g.txt", "f.txt"], {"folders reached", "hidden folders"}),
        "**/**/g.*": (["a/g.txt"], {"folders reached", "hidden folders"}),
        "**/a": (["a/g.txt"], {"folders reached", "hidden folders", "without an"}),
    }
    for pattern, (names, reasons) in expected.items():
        check_files([f"{root}/d/{pattern}"], SUFFIXES["text"], "data.paths")
        found = find_files([f"{root}/d/{pattern}"], SUFFIXES["text"], "data.paths")
        assert [file.name for file in found.files] == names
        assert {" ".join(reason.split()[:2]) for reason in found.left_out} == reasons
        assert all(len(left) == 1 for left in found.left_out.values())  # l1 and l2 lead to one folder


def test_one_folder_that_a_pattern_reaches_in_several_ways_counts_once(write_files) -> None:
    root = write_files({"d/a/f.txt": "f", "d/a/b.dat": "b", "d/c/g.txt": "g"})
    for name in ("1", "2", "3"):
        (root / "d" / name).symlink_to("a")
    found = find_files([f"{root}/d/*"], SUFFIXES["text"], "data.paths")
    assert [file.name for file in found.files] == ["a/f.txt", "c/g.txt"]  # by the name that is no link
    assert [len(names) for names in found.left_out.values()] == [1, 1]
    assert "2 files taken, 2 left out" in found.account("data.paths")
