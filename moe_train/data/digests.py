"""Digests of file contents, stored on disk so that an unchanged corpus is not read again at every start."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from moe_train.config.errors import UsageError
from moe_train.data.files import CorpusFile
from moe_train.data.folders import build_once, write_json

DIGEST_BYTES = 16
CHUNK_BYTES = 2**20
# A file that is written twice within one tick of the file system's clock keeps its time stamp. So only older stamps are
# trusted.
SETTLED_SECONDS = 2.0

Result = TypeVar("Result")
Stamp = tuple[int, ...]  # size in bytes, mtime in ns, ctime in ns, inode
Record = tuple[Stamp, str]  # stamp and digest


def digest_of(value: object) -> str:
    """Compute the hexadecimal digest of a JSON value: a key for stored results that depend on this value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=DIGEST_BYTES).hexdigest()


def file_digests(files: Sequence[CorpusFile], folder: Path, wait_seconds: float) -> list[str]:
    """Compute the digest of each file's contents; only new and changed files are read.

    If several processes ask for the same files at once, one of them reads the files. The others wait for its result.

    Args:
        files: Files to digest.
        folder: Folder of the stored digests, which are valid for a path and a stamp: size, time of modification, time
            of change and inode. Programs set the time of modification as they like; the time of change is the file
            system's own, and moves with every write.
        wait_seconds: Seconds to wait before reading, so that another process can begin first.

    Returns:
        One hexadecimal digest per file, in the same order.

    Raises:
        UsageError: If a file cannot be read.
    """
    paths = [str(file.path.absolute()) for file in files]
    memory = folder / f"{digest_of(paths)}.json"

    def find() -> list[str] | None:
        records = _load(memory)
        known = [_known_digest(path, records) for path in paths]
        return None if None in known else [digest for digest in known if digest is not None]

    def build() -> list[str]:
        records = _load(memory)
        digests, settled = [], {}
        for path in paths:
            stamp, digest = record = _record(path, records.get(path))
            digests.append(digest)
            if time.time() - max(stamp[1:3]) / 1e9 > SETTLED_SECONDS:
                settled[path] = record
        write_json(memory, settled)
        return digests

    return build_once(memory, find, build, wait_seconds)


def read_digests(files: Sequence[CorpusFile]) -> list[str]:
    """Compute the digest of each file's contents by reading it; see `file_digests`."""
    return [_readable(str(file.path), partial(_digest_file, str(file.path))) for file in files]


def _load(memory: Path) -> dict[str, Record]:
    try:
        records = json.loads(memory.read_bytes()).items()
        return {path: (tuple(stamp), str(digest)) for path, (stamp, digest) in records}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # not written yet, damaged, or of an earlier version: the files are read again


def _known_digest(path: str, records: dict[str, Record]) -> str | None:
    record = records.get(path)
    return record[1] if record is not None and record[0] == _stamp(path) else None


def _record(path: str, known: Record | None) -> Record:
    stamp = _stamp(path)
    if known is not None and known[0] == stamp:
        return known
    return stamp, _readable(path, lambda: _digest_file(path))


def _stamp(path: str) -> Stamp:
    status = _readable(path, lambda: os.stat(path))
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _digest_file(path: str) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _readable(path: str, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
