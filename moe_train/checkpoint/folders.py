"""Folders of a run's checkpoints: where they are, how one is completed, and which ones are kept."""

import contextlib
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.checkpoint.files import sync_folder, write_durably
from moe_train.checkpoint.manifest import MANIFEST, encode_manifest

LATEST = "latest"  # file with the name of the newest checkpoint, for users and scripts; resuming does not need it
_FOLDER = re.compile(r"step_([0-9]{8,})")
_LEFT = re.compile(r"step_[0-9]{8,}\.(part|old|removed)")


@dataclass(frozen=True)
class Retention:
    """Rule for which checkpoints are kept.

    Attributes:
        keep_last: Number of newest checkpoints to keep.
        keep_every: Also keep checkpoints whose step is a multiple of this number; 0: no others.
    """

    keep_last: int
    keep_every: int = 0


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def part_folder(checkpoints: Path, step: int) -> Path:
    """Return the path of a step's checkpoint while it is written."""
    return checkpoints / f"step_{step:08d}.part"


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    found = _FOLDER.fullmatch(folder.name)
    assert found is not None
    return int(found[1])


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """List the completed checkpoints, oldest first, without a check for damage."""
    if not checkpoints.is_dir():
        return []
    found = [folder for folder in checkpoints.iterdir() if _FOLDER.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=step_of)


def begin_checkpoint(checkpoints: Path, step: int) -> Path:
    """Create an empty folder under a temporary name, for `complete_checkpoint` once it is filled."""
    part = part_folder(checkpoints, step)
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed while saving
    part.mkdir(parents=True)
    return part


def complete_checkpoint(part: Path, values: Mapping[str, Any]) -> Path:
    """Give a filled folder its manifest and its final name, and make `latest` point to it.

    Args:
        part: Folder from `begin_checkpoint`; its files are flushed.
        values: Values of the manifest.

    Returns:
        Folder of the checkpoint.
    """
    final = part.with_suffix("")
    write_durably(part / MANIFEST, encode_manifest(values))
    sync_folder(part)
    if final.exists():  # from a run that was damaged or rolled back; it is removed only after the new one has its name
        old = final.with_name(f"{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.replace(old)
        try:
            part.replace(final)
        except OSError:
            old.replace(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.replace(final)
    with contextlib.suppress(OSError):  # the checkpoint is complete, and resuming finds it without `latest`
        point_latest(final)
    return final


def point_latest(final: Path) -> None:
    """Make `latest` point to a checkpoint."""
    latest = final.with_name(f"{LATEST}.part")
    write_durably(latest, f"{final.name}\n")
    latest.replace(final.with_name(LATEST))
    sync_folder(final.parent)


def quarantine(folder: Path) -> Path:
    """Quarantine a damaged checkpoint: rename it, so that it is neither used nor removed. Return its new path."""
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged{number}")
    folder.replace(aside)
    return aside


def superfluous(checkpoints: Path, retention: Retention) -> list[Path]:
    """List the checkpoints that the retention rule does not keep, oldest first."""
    older = list_checkpoints(checkpoints)[: -retention.keep_last]
    every = retention.keep_every
    return [folder for folder in older if every == 0 or step_of(folder) % every]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a partly removed one is never taken for a checkpoint.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        OSError: If the folder cannot be renamed. What remains of a renamed folder is not a checkpoint.
    """
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.replace(removed)
    shutil.rmtree(removed, ignore_errors=True)


def list_leftovers(checkpoints: Path) -> list[Path]:
    """List the folders that a killed save or removal has left, or that one under way has now."""
    if not checkpoints.is_dir():
        return []
    return sorted(folder for folder in checkpoints.iterdir() if _LEFT.fullmatch(folder.name))


def remove_leftovers(checkpoints: Path, spare: Collection[Path] = ()) -> None:
    """Remove what a killed save or removal has left, and restore an old copy whose replacement was never completed.

    Args:
        checkpoints: Folder of the run's checkpoints.
        spare: Leftovers to keep, because they may belong to a save under way.
    """
    for folder in list_leftovers(checkpoints):
        if folder in spare:
            continue
        final = folder.with_suffix("")
        if folder.suffix == ".old" and not final.exists():
            folder.replace(final)
        else:
            shutil.rmtree(folder, ignore_errors=True)
