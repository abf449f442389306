"""Things built once: locks, folders that appear whole, and where the cache lies."""

import os
import tempfile
import threading
from pathlib import Path

import pytest

from moe_train.config.errors import UsageError
from moe_train.data import folders
from moe_train.data.folders import build_once, cache_root, replaced_folder, write_json


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(RuntimeError, match="half way"), replaced_folder(target) as temporary:
        (temporary / "a").write_text("a")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []
    with replaced_folder(target) as temporary:
        (temporary / "a").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_replaces_another_and_removes_what_was_left_behind(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    for name in (".folder.123-abc", ".folder.124-abc.old", ".folder2.1-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("left")
    with replaced_folder(target) as temporary:
        (temporary / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder2.1-a", "folder"]


def test_one_builds_and_the_others_wait_for_it(tmp_path):
    target, built, results = tmp_path / "made", [], []

    def find():
        return target.read_text() if target.exists() else None

    def build(name):
        built.append(name)
        threading.Event().wait(0.2)
        target.write_text(name)
        return name

    threads = [
        threading.Thread(target=lambda n=str(n): results.append(build_once(target, find, lambda: build(n), 0.0)))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(built) == 1
    assert results == built * 4


def test_only_who_has_to_build_waits_for_others_first(tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(folders.time, "sleep", waits.append)
    assert build_once(tmp_path / "made", lambda: "there", lambda: "built", 1.5) == "there"
    assert waits == []
    finds = iter([None, "built by another meanwhile"])
    assert build_once(tmp_path / "made", lambda: next(finds), lambda: "built", 1.5) == "built by another meanwhile"
    assert waits == [1.5]


def test_after_an_error_the_next_builds(tmp_path):
    def fail():
        raise UsageError("no")

    for _ in range(2):
        with pytest.raises(UsageError, match="no"):
            build_once(tmp_path / "made", lambda: None, fail, 0.0)
    assert build_once(tmp_path / "made", lambda: None, lambda: "built", 0.0) == "built"


def test_json_is_replaced_and_leaves_nothing_behind(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert (tmp_path / "a.json").read_text() == '{\n "x": 2\n}\n'
    assert len(list(tmp_path.iterdir())) == 1


def test_the_cache_lies_where_settings_or_the_desktop_standard_say(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root(None) == tmp_path / "xdg" / "moe_train"
    assert cache_root("~/here") == tmp_path / "home" / "here"
    for value in ("", "relative/is/ignored"):  # as the standard says
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_root(None) == tmp_path / "home" / ".cache" / "moe_train"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root(None) == tmp_path / "home" / ".cache" / "moe_train"
    monkeypatch.chdir(tmp_path)
    assert cache_root("there") == tmp_path / "there"
    assert Path("there").is_dir()


def test_a_cache_that_cannot_be_made_or_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=rf"data\.cache_dir \('{tmp_path}/file/x'\) cannot be made: Not a directory"):
        cache_root(str(tmp_path / "file" / "x"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # the test may run as root, whom no mode stops
    with pytest.raises(UsageError, match=r"data\.cache_dir .* cannot be written to"):
        cache_root(str(tmp_path))


def test_without_a_home_folder_the_cache_is_under_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"moe_train-{os.getuid()}"
    homes = ["", "/proc/none"]  # not known, and one that nobody can write to
    for home in homes:
        monkeypatch.setenv("HOME", home)
        assert cache_root(None) == own and own.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError, match="home folder is not known"):
        monkeypatch.setenv("HOME", "")
        cache_root("~/here")
    other = os.getuid() + 1
    own.rename(tmp_path / f"moe_train-{other}")  # made by this user, who is another one now
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(UsageError, match="is another user's: give a folder"):
        cache_root(None)
