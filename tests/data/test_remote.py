"""Remote files as data: listed like local ones, copied once, and again when they changed."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from moe_train.config.errors import UsageError
from moe_train.data.files import SUFFIXES, check_files, find_files
from moe_train.host.remote_files import open_remote

TEXT = SUFFIXES["text"]
FILES = ("a.txt", "b/c.txt", "b/c.dat", "b/.hidden.txt", "[v2]/d.txt")


@pytest.fixture(params=["memory", "dir"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a folder of files: in memory, and a local folder as fsspec's own file system of a folder."""
    filesystem = fsspec.filesystem("memory" if request.param == "memory" else "file")
    root = "/bucket" if request.param == "memory" else str(tmp_path / "bucket")
    for name in FILES:
        filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe(f"{root}/{name}", name.encode())
    yield "memory://bucket" if request.param == "memory" else f"dir://bucket::file://{tmp_path}"
    filesystem.rm(root, recursive=True)


def find(url: str, tmp_path: Path) -> dict[str, str]:
    files = find_files([url], TEXT, "data.paths", str(tmp_path / "cache")).files
    return {file.name: file.path.read_text() for file in files}


def test_a_folder_is_walked_and_read(base: str, tmp_path: Path) -> None:
    check_files([base], TEXT, "data.paths")
    assert find(base, tmp_path) == {name: name for name in ("[v2]/d.txt", "a.txt", "b/c.txt")}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.txt", {"a.txt"}),
        ("b/*.dat", {"c.dat"}),
        ("*/c.*", {"b/c.dat", "b/c.txt"}),
        ("{a,b/c}.txt", {"a.txt", "b/c.txt"}),
        ("[v2]/d.txt", {"d.txt"}),
        ("?", {"b/c.txt"}),
    ],
)
def test_patterns_are_those_of_local_files(tmp_path: Path, pattern: str, names: set[str]) -> None:
    filesystem = fsspec.filesystem("memory")
    for name in FILES:
        filesystem.pipe(f"/bucket/{name}", name.encode())
    assert set(find(f"memory://bucket/{pattern}", tmp_path)) == names


def test_a_file_is_copied_once_and_again_when_it_changed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/one.txt", b"first")
    for content, copies in ((b"first", 1), (b"first", 0), (b"other", 1)):
        if content != b"first":
            filesystem.pipe("/bucket/one.txt", content)
        assert find("memory://bucket/one.txt", tmp_path) == {"one.txt": content.decode()}
        assert capsys.readouterr().err.count("copying /bucket/one.txt") == copies


@pytest.mark.parametrize("url", ["memory://bucket/none.txt", "memory://bucket/none*", "memory://none"])
def test_what_is_not_there_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(url, tmp_path)
    assert str(caught.value).startswith(f"data.paths ({url!r}): ")


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("abfs://container/x", "pip install adlfs"),
        ("sftp://host/x", "pip install paramiko"),
        ("webdav://host/x", "webdav4"),
        ("s33://bucket/x", "no protocol that fsspec knows, as s3://"),
        ("zip://x::s33://bucket/x.zip", "no protocol that fsspec knows"),
    ],
)
def test_a_missing_package_is_named(url: str, cure: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_remote(url, "data.paths")
    assert str(caught.value).startswith(f"data.paths ({url!r}): ") and cure in str(caught.value)


def test_what_a_file_system_raises_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Denied(Exception):
        """Of a file system's own kind."""

    def refuse(*arguments: object, **options: object) -> None:
        raise Denied("no credentials\nfound")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "exists", refuse)
    with pytest.raises(UsageError, match=r"data.paths .'memory://x'.: cannot be listed: Denied: no credentials found"):
        find("memory://x", tmp_path)
