"""Digests of file contents, stored on disk so that an unchanged corpus is not read again at every start."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
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
Record = tuple[int, int, str]  # size in bytes, mtime in ns, digest


def digest_of(value: object) -> str:
    """Compute the hexadecimal digest of a JSON value: a key for stored results that depend on this value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=DIGEST_BYTES).hexdigest()


def file_digests(files: Sequence[CorpusFile], folder: Path, wait_seconds: float) -> list[str]:
    """Compute the digest of each file's contents; only new and changed files are read.

    If several processes ask for the same files at once, one of them reads the files. The others wait for its result.

    Args:
        files: Files to digest.
        folder: Folder of the stored digests, which are valid for a path, size and time of modification.
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
            record = _record(path, records.get(path))
            digests.append(record[2])
            if time.time() - record[1] / 1e9 > SETTLED_SECONDS:
                settled[path] = record
        write_json(memory, settled)
        return digests

    return build_once(memory, find, build, wait_seconds)


def _load(memory: Path) -> dict[str, Record]:
    try:
        return {path: tuple(record) for path, record in json.loads(memory.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # not written yet, or damaged: the files are read again


def _known_digest(path: str, records: dict[str, Record]) -> str | None:
    record = records.get(path)
    if record is None:
        return None
    status = _readable(path, lambda: os.stat(path))
    return record[2] if record[:2] == (status.st_size, status.st_mtime_ns) else None


def _record(path: str, known: Record | None) -> Record:
    status = _readable(path, lambda: os.stat(path))
    if known is not None and known[:2] == (status.st_size, status.st_mtime_ns):
        return known
    return status.st_size, status.st_mtime_ns, _readable(path, lambda: _digest_file(path))


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
