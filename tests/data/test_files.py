"""Which files a source is made of."""

from pathlib import Path

import pytest

from moe_train.config.errors import UsageError
from moe_train.data.files import SUFFIXES, check_files, find_files, stdlib_files

TEXT = SUFFIXES["text"]


def names(patterns: list[str]) -> list[str]:
    return [file.name for file in find_files(patterns, TEXT, "data.paths")]


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


@pytest.mark.parametrize("find", [find_files, check_files])
@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("{}/missing.txt", "no such file or folder"),
        ("{}/*.zip", "the pattern matches no file"),
        ("{}/empty", r"the folder holds no \*.txt or \*.md file"),
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
