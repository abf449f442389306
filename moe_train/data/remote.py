"""Remote files of data: listed like local ones, and copied once into the cache, where the readers read them."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from moe_train.data.folders import build_once, replaced_folder, write_json
from moe_train.data.patterns import expand_braces, has_wildcard
from moe_train.data.report import say
from moe_train.host.remote_files import open_remote, remote_errors

# Parts of the names under which file systems tell a version: ETag, LastModified, md5Hash, mtime, blob_id and others.
_VERSION_WORDS = (
    *("etag", "md5", "sha", "hash", "crc", "chksum", "digest", "blob", "commit", "generation", "version"),
    *("modif", "mtime", "date", "created", "write_time"),
)


@dataclass(frozen=True)
class RemoteFile:
    """File of a remote file system.

    Attributes:
        url: URL or pattern that led to it, for messages.
        path: Path in the file system.
        name: Name relative to the folder or to the fixed part of the pattern.
        setting: Name of the field that named it.
        is_in_folder: Whether its folder was named, not the file itself.
        filesystem: The `fsspec` file system.
    """

    url: str
    path: str
    name: str
    setting: str
    is_in_folder: bool
    filesystem: Any = field(compare=False)


def list_remote(url: str, setting: str) -> Iterator[RemoteFile]:
    """Find the remote files that a URL or a pattern names; of folders, all files.

    Args:
        url: File, folder or pattern.
        setting: Name of the setting, for messages.

    Raises:
        UsageError: If the file system cannot be opened or asked.
    """
    filesystem, path = open_remote(url, setting)
    with remote_errors(url, setting, "cannot be listed"):
        if filesystem.exists(path) or not has_wildcard(path):
            matches, root = [path], _parent(path)
            if not filesystem.exists(path):
                return
            if filesystem.isdir(path):
                root = path
        else:
            matches = [found for one in expand_braces(path, setting) for found in sorted(filesystem.glob(one))]
            root = _fixed_root(path)
        for match in matches:
            is_folder = filesystem.isdir(match)
            for file in sorted(filesystem.find(match)) if is_folder else [match]:
                yield RemoteFile(url, file, _relative(file, root), setting, is_folder, filesystem)


def fetch(file: RemoteFile, cache: Path, wait_seconds: float = 0.0) -> Path:
    """Copy a remote file into the cache, unless the same version is there already.

    A file whose server gives no version is copied each time. If its contents are those of the copy that is there, the
    path stays.

    Args:
        file: Remote file.
        cache: Folder of the cache.
        wait_seconds: Seconds to wait before copying, so that another process of the host can begin first.

    Returns:
        Path of the copy, whose name ends like the file's.

    Raises:
        UsageError: If it cannot be read.
    """
    with remote_errors(file.url, file.setting, f"{file.path} cannot be read"):
        info = file.filesystem.info(file.path)
        version, size = _version(info), info.get("size")
        if version is None:
            return _fetch_without_version(file, cache / "remote", size, wait_seconds)
        folder = _folder(file, cache / "remote", str(file.filesystem.ukey(file.path)), version)
        copy = folder / PurePosixPath(file.path).name

        def find() -> Path | None:
            return copy if copy.is_file() and size in (None, copy.stat().st_size) else None

        def build() -> Path:
            say(_copying(file, size))
            with replaced_folder(folder) as part:
                file.filesystem.get_file(file.path, str(part / copy.name))
            return copy

        return build_once(folder, find, build, wait_seconds)


def _version(info: Mapping[str, Any]) -> str | None:
    """Return what a file system tells of a file's version: an etag, a hash or a time; None if it tells nothing.

    `ukey` alone is not enough: that of http and https is a hash of the URL.
    """
    marks = [
        f"{name}={value}"
        for name, value in sorted(info.items())
        if value and any(word in name.lower() for word in _VERSION_WORDS)
    ]
    return "\n".join(marks) if marks else None


def _fetch_without_version(file: RemoteFile, root: Path, size: int | None, wait_seconds: float) -> Path:
    """Copy a file into a folder that its contents name; processes that ask at the same time share one copy."""
    latest, asked = _folder(file, root, "latest").with_suffix(".json"), time.time()
    name = PurePosixPath(file.path).name

    def find() -> Path | None:
        try:
            copy = root / json.loads(latest.read_text())["folder"] / name
            return copy if latest.stat().st_mtime > asked and copy.is_file() else None
        except (OSError, ValueError, LookupError, TypeError):
            return None  # not written yet, or damaged

    def build() -> Path:
        say(f"{_copying(file, size)}: it has no ETag or Last-Modified, so it is copied at every start and compared")
        new = root / f".{latest.stem}.new"
        shutil.rmtree(new, ignore_errors=True)  # what a killed process left; this one holds the lock
        new.mkdir(parents=True)
        file.filesystem.get_file(file.path, str(new / name))
        with open(new / name, "rb") as contents:
            folder = _folder(file, root, "contents", hashlib.file_digest(contents, "blake2b").hexdigest())
        copy = folder / name
        if not copy.is_file() or copy.stat().st_size != (new / name).stat().st_size:
            with replaced_folder(folder) as part:
                os.replace(new / name, part / name)
        shutil.rmtree(new, ignore_errors=True)
        write_json(latest, {"folder": folder.name})
        return copy

    return build_once(latest, find, build, wait_seconds)


def _folder(file: RemoteFile, root: Path, *version: str) -> Path:
    key = "\n".join([file.url, file.path, *version])
    return root / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _copying(file: RemoteFile, size: int | None) -> str:
    return f"copying {file.path} ({(size or 0) / 1e6:,.1f} MB) of {file.setting} ({file.url}) into the cache"


def _fixed_root(pattern: str) -> str:
    """Return the folder before the first part of a pattern that can match several names."""
    parts = PurePosixPath(pattern).parts
    number = next(number for number, part in enumerate(parts) if has_wildcard(part))
    return str(PurePosixPath(*parts[:number])) if number else ""


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _relative(path: str, root: str) -> str:
    found = PurePosixPath(path)
    return found.relative_to(root).as_posix() if root and found.is_relative_to(root) else found.as_posix()
