"""Remote files of data: listed like local ones, and copied once into the cache, where the readers read them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from moe_train.data.folders import build_once, replaced_folder
from moe_train.data.patterns import expand_braces, has_wildcard
from moe_train.data.report import say
from moe_train.host.remote_files import open_remote, remote_errors


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
        # The file system's own mark of a version: an etag or a hash where it has one, else size and time.
        version, size = str(file.filesystem.ukey(file.path)), file.filesystem.size(file.path)
        key = hashlib.blake2b("\n".join([file.url, file.path, version]).encode(), digest_size=16).hexdigest()
        folder = cache / "remote" / key
        copy = folder / PurePosixPath(file.path).name

        def find() -> Path | None:
            return copy if copy.is_file() and size in (None, copy.stat().st_size) else None

        def build() -> Path:
            say(f"copying {file.path} ({(size or 0) / 1e6:,.1f} MB) of {file.setting} ({file.url}) into the cache")
            with replaced_folder(folder) as part:
                file.filesystem.get_file(file.path, str(part / copy.name))
            return copy

        return build_once(folder, find, build, wait_seconds)


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
