"""Pruning of checkpoints on request. It never removes the newest valid checkpoint."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_train.checkpoint.files import Advance
from moe_train.checkpoint.folders import (
    Retention,
    list_checkpoints,
    list_leftovers,
    remove_checkpoint,
    remove_leftovers,
    superfluous,
)
from moe_train.checkpoint.inventory import file_statuses, folder_bytes, stat_of
from moe_train.checkpoint.manifest import DamagedCheckpoint, Manifest
from moe_train.checkpoint.resume_point import latest_valid
from moe_train.checkpoint.verification import read_verified
from moe_train.config.errors import UsageError

SAVING_SECONDS = 600  # a leftover with a write during this time may belong to a save under way


@dataclass(frozen=True)
class Pruning:
    """Result of a pruning, or of a dry run.

    Attributes:
        removed: Names of the removed checkpoints.
        kept: Names of the checkpoints that stay.
        leftovers: Names of the removed leftovers of killed saves and removals.
        spared: Names of the leftovers that stay, because they may belong to a save under way.
        restored: Names of old copies that got their name back, because their replacement was never completed.
        damaged: What is wrong with each checkpoint newer than the newest valid one, by name.
        latest_valid: Name of the newest valid checkpoint. None: no checkpoint is valid, and none was removed. It is
            also None if no checkpoint was to be removed, because then no file is read.
        freed_bytes: Size of everything removed.
    """

    removed: list[str]
    kept: list[str]
    leftovers: list[str]
    spared: list[str]
    restored: list[str]
    freed_bytes: int
    damaged: dict[str, str] = field(default_factory=dict)
    latest_valid: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def prune(
    checkpoints: Path, retention: Retention, is_dry: bool, advance: Advance | None = None, now: float | None = None
) -> Pruning:
    """Remove the checkpoints that the retention rule does not keep, and leftovers.

    The newest checkpoints are verified until one is valid. That one is kept, even if the retention rule does not keep
    it. If no checkpoint is valid, none is removed.

    Args:
        checkpoints: Folder of the run's checkpoints.
        retention: Rule for which checkpoints are kept.
        is_dry: Whether to remove nothing.
        advance: Called with the number of bytes after each block that verification reads.
        now: Current time in seconds since the epoch; None: the system's clock.

    Raises:
        OSError: If a checkpoint cannot be removed.
    """
    remove, damaged, whole = superfluous(checkpoints, retention), {}, None
    if remove:
        point = latest_valid(checkpoints, lambda folder: _read_or_pass_over(folder, advance))
        damaged = {damage.folder.name: damage.reason for damage in point.damaged}
        whole = point.manifest.folder if point.manifest is not None else None
        remove = [folder for folder in remove if folder != whole] if whole is not None else []
    leftovers = list_leftovers(checkpoints)
    spared = [folder for folder in leftovers if _is_fresh(folder, time.time() if now is None else now)]
    idle = [folder for folder in leftovers if folder not in spared]
    restored = [folder for folder in idle if folder.suffix == ".old" and not folder.with_suffix("").exists()]
    gone = [folder for folder in idle if folder not in restored]
    freed = sum(folder_bytes(folder) for folder in [*remove, *gone])
    kept = [folder.name for folder in list_checkpoints(checkpoints) if folder not in remove]
    if not is_dry:
        for folder in remove:
            if folder.exists():  # otherwise the run itself has removed it
                remove_checkpoint(folder)
        # Only the leftovers found above: a run may begin a save at any time.
        begun = [folder for folder in list_leftovers(checkpoints) if folder not in (*gone, *restored)]
        remove_leftovers(checkpoints, begun)
        freed -= sum(folder_bytes(folder) for folder in list_leftovers(checkpoints) if folder not in spared)
    names = lambda folders: [folder.name for folder in folders if folder not in spared]  # noqa: E731
    return Pruning(
        removed=names(remove),
        kept=kept,
        leftovers=names(gone),
        spared=[folder.name for folder in spared],
        restored=names(restored),
        freed_bytes=freed,
        damaged=damaged,
        latest_valid=whole.name if whole is not None else None,
    )


def _read_or_pass_over(folder: Path, advance: Advance | None) -> Manifest:
    """Verify a checkpoint. One that cannot be read for another reason, such as a newer format, is passed over too."""
    try:
        return read_verified(folder, advance)
    except DamagedCheckpoint:
        raise
    except UsageError as error:
        raise DamagedCheckpoint(str(error)) from error


def _is_fresh(folder: Path, now: float) -> bool:
    if folder.suffix == ".removed":
        return False  # no process needs it, whichever one removes it
    own = stat_of(folder)
    statuses = [*([own] if own is not None else []), *file_statuses(folder)]
    if folder.suffix == ".old" and own is not None and now - own.st_ctime < SAVING_SECONDS:
        return True  # a save under way has just renamed it; a rename leaves the times of its files unchanged
    return any(now - status.st_mtime < SAVING_SECONDS for status in statuses)
