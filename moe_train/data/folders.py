"""Results on disk that one process builds while others wait: a lock per result, and folders that appear complete."""

import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from moe_train.config.errors import UsageError
from moe_train.config.paths import home_folder, local_path

Result = TypeVar("Result")


def cache_root(setting: str | None) -> Path:
    """Find the folder of tokenized data, and create it if it does not exist.

    Args:
        setting: Value of data.cache_dir; None takes $XDG_CACHE_HOME/moe_train or ~/.cache/moe_train, or a folder of
            this user under TMPDIR if there is no home folder that can be written to, as in a container.

    Returns:
        An absolute path.

    Raises:
        UsageError: If the folder cannot be created or written to.
    """
    root = _default_cache() if setting is None else local_path(setting, "data.cache_dir").absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"data.cache_dir ({str(root)!r}) cannot be made: {error.strerror}") from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UsageError(f"data.cache_dir ({str(root)!r}) cannot be written to")
    return root


def _default_cache() -> Path:
    base, home = os.path.expandvars("${XDG_CACHE_HOME}"), home_folder()  # the text stays where the variable is not set
    if os.path.isabs(base):
        return Path(base) / "moe_train"
    if home is not None:
        root = Path(home, ".cache", "moe_train")
        with suppress(OSError):  # a container's home folder may be missing or read-only
            root.mkdir(parents=True, exist_ok=True)
            if os.access(root, os.W_OK | os.X_OK):
                return root
    own = Path(tempfile.gettempdir(), f"moe_train-{os.getuid()}")
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid():  # others may write there, and could plant tokens
        raise UsageError(f"data.cache_dir (None): there is no home folder, and {own} is another user's: give a folder")
    return own


def build_once(
    target: Path, find: Callable[[], Result | None], build: Callable[[], Result], wait_seconds: float
) -> Result:
    """Open a result, or let one process build it while the other processes wait.

    A process that dies releases the lock, because the lock belongs to the open file. If a build raises, the next
    process builds, and so meets the same error.

    Args:
        target: File or folder of the result; the lock file lies beside it.
        find: Called without arguments; opens the result, or returns None if it does not exist or is damaged.
        build: Called without arguments, under the lock; builds the result and returns what `find` would return.
        wait_seconds: Seconds to wait before taking the lock, so that another process can take it first.

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
    """Provide an empty folder that replaces `folder` when the block ends without an exception.

    The caller holds the lock of `folder`. So no process uses what unfinished builds left, and it is removed first.

    Args:
        folder: Final path; a folder that exists there (a damaged one) is replaced.

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
    """Write a JSON file atomically: readers see the old contents or the new contents, never a part of them.

    Args:
        path: File to write.
        value: Value that JSON can represent.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _flush_to_disk(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
