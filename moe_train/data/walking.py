"""Walk of a folder through links: every real folder once, so that links which lead back end."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_train.config.errors import UsageError

LeaveOut = Callable[[str, Path, Path], None]  # reason, path as it was reached, and real path
REACHED_TWICE = "folders reached twice"


def walk_folders(
    root: Path, field: str, leave_out: LeaveOut, seen: set[Path], skipped: frozenset[str] = frozenset()
) -> Iterator[tuple[Path, Path, list[str]]]:
    """Walk a folder in a fixed order: the folders in it first, then those that links lead to, each of them once.

    Args:
        root: Folder to walk.
        field: Name of the setting, for messages.
        leave_out: Called with each folder that is not entered: one reached before, a hidden or a skipped one.
        seen: Real paths of the folders that were walked before; those of this walk are added.
        skipped: Names of folders that are not entered.

    Yields:
        Each folder, its real path, and the sorted names of what is in it and is no folder.

    Raises:
        UsageError: If a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"{field}: {error.filename} cannot be read: {error.strerror}") from error

    waiting = deque([root])
    while waiting:
        for name, folders, files in os.walk(waiting.popleft(), onerror=refuse):
            folder, real = Path(name), Path(name).resolve()
            if real in seen:
                leave_out(REACHED_TWICE, folder, real)
                folders.clear()
                continue
            seen.add(real)
            entered = []
            for inner in sorted(folders):
                if inner.startswith(".") or inner in skipped:
                    leave_out(
                        "hidden folders" if inner.startswith(".") else "skipped folders", folder / inner, real / inner
                    )
                    continue
                entered.append(inner)
                if (folder / inner).is_symlink():
                    waiting.append(folder / inner)
            folders[:] = entered  # os.walk enters no links
            yield folder, real, sorted(files)
