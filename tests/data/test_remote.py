"""Remote files as data: listed like local ones, copied once, and again when they changed."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from moe_train.config.errors import UsageError
from moe_train.data.files import SUFFIXES, check_files, find_files
from moe_train.data.remote import fetch, list_remote
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


class Server(http.server.BaseHTTPRequestHandler):
    """Web server of one file, whose headers a test sets."""

    content: ClassVar[bytes] = b""
    marks: ClassVar[dict[str, str]] = {}
    tells_size: ClassVar[bool] = True

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in self.marks.items():
            self.send_header(name, value)
        if self.tells_size:
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[str]:
    """URL of the file that `Server` serves."""
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp, which is not installed")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/one.txt"
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("tells_size", [True, False])
@pytest.mark.parametrize("mark", ["ETag", "Last-Modified", None])
def test_contents_of_a_web_server_that_change_are_fetched_again(
    server: str,
    mark: str | None,
    tells_size: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Server, "tells_size", tells_size)
    versions = {b"first": "Mon, 01 Jan 2024 00:00:00 GMT", b"other": "Tue, 02 Jan 2024 00:00:00 GMT"}
    paths = []
    for content in (b"first", b"first", b"other", b"other", b"first"):
        monkeypatch.setattr(Server, "content", content)
        monkeypatch.setattr(Server, "marks", {} if mark is None else {mark: versions[content]})
        (file,) = find_files([server], TEXT, "data.paths", str(tmp_path / "cache")).files
        assert (file.name, file.path.read_bytes()) == ("one.txt", content)
        paths.append(file.path)
    assert paths[0] == paths[1] == paths[4] != paths[2] == paths[3]
    said = capsys.readouterr().err
    assert said.count("copying") == (5 if mark is None else 2)
    assert said.count("it has no ETag or Last-Modified") == (5 if mark is None else 0)


def test_without_a_version_the_contents_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(kind, "info", lambda self, path, **_: {"name": path, "size": 5, "type": "file"})
    monkeypatch.setattr(kind, "ukey", lambda self, path: "of the name alone")
    for content in (b"first", b"first", b"other"):
        fsspec.filesystem("memory").pipe("/bucket/one.txt", content)
        (file,) = list_remote("memory://bucket/one.txt", "data.paths")
        assert fetch(file, tmp_path / "cache").read_bytes() == content
    folders = [path for path in (tmp_path / "cache" / "remote").iterdir() if path.is_dir()]
    assert len(folders) == 2  # one per contents, and nothing left of the copying


def test_processes_that_ask_together_share_a_copy_without_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kind = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(kind, "info", lambda self, path, **_: {"name": path, "size": None, "type": "file"})
    fsspec.filesystem("memory").pipe("/bucket/one.txt", b"first")
    (file,) = list_remote("memory://bucket/one.txt", "data.paths")
    copies, together = [], threading.Barrier(4)

    def ask() -> None:
        together.wait()
        copies.append(fetch(file, tmp_path / "cache", wait_seconds=0.1).read_bytes())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copies == [b"first"] * 4
    assert capsys.readouterr().err.count("copying") == 1


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
