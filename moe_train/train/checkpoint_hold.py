"""Hold of a run's checkpoints by a tool that changes them, so that no run is at work in the folder meanwhile."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from moe_train.config.errors import UsageError
from moe_train.train.run_folder import RunFolder
from moe_train.train.run_lock import RunLock

_MOST_LINKS = 40  # as many as Linux follows


@contextlib.contextmanager
def hold_checkpoints(checkpoints: Path) -> Iterator[None]:
    """Hold a run's lock while one process changes its checkpoints.

    Args:
        checkpoints: Folder of the run's checkpoints, or a link to it; one of another name is not in a run's folder, and
            has no lock.

    Raises:
        UsageError: If a run is at work in the folder, or the folder cannot be written.
    """
    with contextlib.ExitStack() as locks:
        for run_dir in _run_folders(checkpoints):
            lock = RunLock(run_dir)
            try:
                holder = lock.try_acquire()
            except OSError as error:
                raise UsageError(f"{str(run_dir)!r} cannot be locked: {error}") from error
            if holder is not None:
                raise UsageError(
                    f"{str(run_dir)!r} is in use by a run ({holder.describe()}), which removes its checkpoints by "
                    "checkpoint.keep_last and checkpoint.keep_every: wait for its end, or stop it first"
                )
            locks.callback(lock.release)
        yield


def _run_folders(checkpoints: Path) -> list[Path]:
    """Find the folders of runs whose checkpoints a path means, also over links.

    A link may lead to a run's checkpoints, and these may be a link to another disk.
    """
    path, found = checkpoints.absolute(), dict[Path, None]()
    for _ in range(_MOST_LINKS):
        folder = RunFolder(path.parent.resolve())
        if path.name == "checkpoints" and (not found or folder.config.exists()):
            found[folder.root] = None
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent.resolve() / path.readlink()))
    return list(found)
