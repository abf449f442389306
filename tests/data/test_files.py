"""Which files a source is made of."""

import os
from pathlib import Path

import pytest

from moe_train.config.errors import UsageError
from moe_train.data.files import SUFFIXES, check_files, find_files, stdlib_files

TEXT = SUFFIXES["text"]


def names(patterns: list[str]) -> list[str]:
    return [file.name for file in find_files(patterns, TEXT, "data.paths").files]


def test_a_folder_is_walked_in_sorted_order_for_its_suffixes(write_files):
    folder = write_files(
        {"b.txt": "b", "a/z.md": "z", "a.txt": "a", "c.py": "c", ".hidden.txt": "h", ".git/x.txt": "x"}
    )
    assert names([str(folder)]) == ["a.txt", "a/z.md", "b.txt"]


def test_patterns_are_expanded_and_named_from_their_fixed_part(write_files):
    folder = write_files({"a/1.txt": "1", "b/2.txt": "2", "b/c/3.txt": "3", "b/4.dat": "4"})
    assert names([f"{folder}/*/*.txt"]) == ["a/1.txt", "b/2.txt"]
    assert names([f"{folder}/b/*.dat"]) == ["4.dat"]  # a pattern may name any suffix
    assert names([f"{folder}/**/*.txt"]) == ["a/1.txt", "b/2.txt", "b/c/3.txt"]


def test_the_order_of_the_paths_is_kept_and_files_are_listed_once(write_files):
    folder = write_files({"a.txt": "a", "b.txt": "b", "c.txt": "c"})
    assert names([str(folder / "c.txt"), str(folder)]) == ["c.txt", "a.txt", "b.txt"]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(write_files):
    folder = write_files({"[a].txt": "1", "a.txt": "2"})
    assert names([f"{folder}/[a].txt"]) == ["[a].txt"]


def test_every_file_is_accounted_for(write_files, tmp_path):
    folder = write_files(
        {
            **{
                f"{i}{suffix}": "x"
                for i, suffix in enumerate((".txt", ".TXT", ".Md", ".text", ".rst", ".txt.gz", ".TXT.ZST"))
            },
            **{"a.csv": "1", "b": "2", "c.png": "3", "d.pdf": "4", ".hidden.txt": "5", "deep/er/f.txt": "6"},
            **{".git/g.txt": "7", "dataset_info.json": "8"},
        }
    )
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "far.txt").write_text("far")
    (folder / "link").symlink_to(outside)
    (folder / "deep" / "loop").symlink_to(folder)
    (outside / "back").symlink_to(folder / "deep")
    (folder / "copy.txt").symlink_to(folder / "0.txt")
    (folder / "lost.txt").symlink_to(tmp_path / "nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    found = find_files([str(folder)], TEXT, "data.paths")
    assert [file.name for file in found.files] == sorted(
        [f"{i}{suffix}" for i, suffix in enumerate((".txt", ".TXT", ".Md", ".text", ".rst", ".txt.gz", ".TXT.ZST"))]
        + ["deep/er/f.txt", "link/far.txt"]
    )
    left_out = {reason.split(" (")[0]: names for reason, names in found.left_out.items()}
    assert left_out == {
        "without an ending of this source": ("a.csv", "b", "c.png", "d.pdf"),
        "hidden": (".hidden.txt",),
        "hidden folders": (".git",),
        "about a data set": ("dataset_info.json",),
        "folders reached twice": ("deep/loop", "link/back"),
        "reached twice": ("copy.txt",),
        "links that lead nowhere": ("lost.txt",),
        "neither files nor folders": ("pipe.txt",),
    }
    account = found.account("data.paths")
    assert account.startswith("data.paths: 9 files taken, 12 left out: ")
    assert "(a.csv, b, c.png, ...)" in account


def test_a_folder_that_cannot_be_read_is_named(write_files, monkeypatch):
    folder = write_files({"a.txt": "a", "closed/b.txt": "b"})
    scandir = os.scandir

    def refuse(path):  # root may read everything
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"data\.paths: .*closed cannot be read: Permission denied"):
        names([str(folder)])


def test_a_pipe_is_no_corpus(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a pipe or a device: data is read more than once"):
        names([str(tmp_path / "pipe")])


@pytest.mark.parametrize("find", [find_files, check_files])
@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("{}/missing.txt", "no such file or folder"),
        ("{}/*.zip", "the pattern matches no file"),
        ("{}/empty", r"the folder holds no file with one of the endings \.txt, \.text, \.md"),
    ],
)
def test_nothing_found_names_field_path_and_reason(write_files, find, pattern, reason):
    folder = write_files({"a.txt": "a", "empty/data.csv": "x"})
    pattern = pattern.format(folder)
    with pytest.raises(UsageError, match=reason) as caught:
        find([str(folder / "a.txt"), pattern], TEXT, "data.mixture[1].paths")
    assert str(caught.value).startswith(f"data.mixture[1].paths ({pattern!r}): ")


def test_the_standard_library_has_its_modules_and_no_installed_packages():
    found = {file.name: file for file in stdlib_files()}
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(found)
    assert not [name for name in found if {"site-packages", "__pycache__"} & set(Path(name).parts)]
    assert list(found) == sorted(found)
    assert found["os.py"].path.samefile(__import__("os").__file__)
