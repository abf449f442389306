"""Building a thing on disk once: a lock for each thing, and a folder that appears whole or not at all."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from moe_train.config.errors import UsageError

Result = TypeVar("Result")


def cache_root(setting: str | None) -> Path:
    """The folder of tokenized data, made if it is not there.

    Args:
        setting: data.cache_dir; None takes $XDG_CACHE_HOME/moe_train or ~/.cache/moe_train.

    Returns:
        An absolute path.

    Raises:
        UsageError: If the folder cannot be made or written to.
    """
    if setting is None:
        base = os.path.expandvars("${XDG_CACHE_HOME}")  # stays as it is where the variable is not set
        root = Path(base if os.path.isabs(base) else "~/.cache").expanduser() / "moe_train"
    else:
        root = Path(setting).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"data.cache_dir ({str(root)!r}) cannot be made: {error.strerror}") from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UsageError(f"data.cache_dir ({str(root)!r}) cannot be written to")
    return root


def build_once(
    target: Path, find: Callable[[], Result | None], build: Callable[[], Result], wait_seconds: float
) -> Result:
    """What is there already, or what one of the processes that want it builds while the others wait.

    A process that dies leaves the lock free (it belongs to the open file); one whose build raises leaves the next to
    build, and so to meet the same error.

    Args:
        target: The file or folder in question; the lock lies beside it.
        find: Opens it; None if it is not there or damaged.
        build: Makes it and returns what `find` would. Runs under the lock.
        wait_seconds: How long to let another process take the lock first.

    Returns:
        The result of `find` or `build`.
    """
    from filelock import FileLock

    found = find()
    if found is not None:
        return found
    time.sleep(wait_seconds)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f"{target.name}.lock"):
        found = find()
        return build() if found is None else found


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends without an exception.

    The caller holds the lock of `folder`, so what earlier builds left half done is nobody's and is removed first.

    Args:
        folder: Where the folder is to appear; a folder that is there (a damaged one) is replaced.

    Yields:
        The temporary folder to fill.
    """
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush_to_disk(file)
        if folder.exists():
            os.replace(folder, temporary.with_name(f"{temporary.name}.old"))
        os.replace(temporary, folder)
    finally:
        for leftover in folder.parent.glob(f"{temporary.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that readers see the old contents or the new, never half of them."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _flush_to_disk(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
