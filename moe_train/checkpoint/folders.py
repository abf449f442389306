"""The checkpoints of a run: where they are, how one is completed, which are kept."""

import contextlib
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.checkpoint.files import sync_folder, write_durably
from moe_train.checkpoint.manifest import MANIFEST, encode_manifest

LATEST = "latest"  # names the newest checkpoint, for people and scripts; resuming does not need it
_FOLDER = re.compile(r"step_([0-9]{8,})")
_LEFT = re.compile(r"step_[0-9]{8,}\.(part|old|removed)")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept.

    Attributes:
        keep_last: The newest so many.
        keep_every: And those of steps that are a multiple of it; 0: no others.
    """

    keep_last: int
    keep_every: int = 0


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return checkpoints / f"step_{step:08d}"


def part_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is while it is written."""
    return checkpoints / f"step_{step:08d}.part"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    found = _FOLDER.fullmatch(folder.name)
    assert found is not None
    return int(found[1])


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Every checkpoint that was completed, oldest first; damage is not looked for."""
    if not checkpoints.is_dir():
        return []
    found = [folder for folder in checkpoints.iterdir() if _FOLDER.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=step_of)


def begin_checkpoint(checkpoints: Path, step: int) -> Path:
    """An empty folder under a temporary name, to be filled and completed."""
    part = part_folder(checkpoints, step)
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed while saving
    part.mkdir(parents=True)
    return part


def complete_checkpoint(part: Path, values: Mapping[str, Any]) -> Path:
    """Give a filled folder its manifest and its name, and let `latest` name it.

    Args:
        part: From `begin_checkpoint`; its files are flushed.
        values: Of the manifest.

    Returns:
        The checkpoint's folder.
    """
    final = part.with_suffix("")
    write_durably(part / MANIFEST, encode_manifest(values))
    sync_folder(part)
    if final.exists():  # saved by a run that was damaged or rolled back: gone only when the new one has its name
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
    with contextlib.suppress(OSError):  # the checkpoint is complete, and found without it
        point_latest(final)
    return final


def point_latest(final: Path) -> None:
    """Let `latest` name a checkpoint."""
    latest = final.with_name(f"{LATEST}.part")
    write_durably(latest, f"{final.name}\n")
    latest.replace(final.with_name(LATEST))
    sync_folder(final.parent)


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither found nor removed; its new name."""
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged{number}")
    folder.replace(aside)
    return aside


def superfluous(checkpoints: Path, retention: Retention) -> list[Path]:
    """The checkpoints that retention does not keep, oldest first."""
    older = list_checkpoints(checkpoints)[: -retention.keep_last]
    every = retention.keep_every
    return [folder for folder in older if every == 0 or step_of(folder) % every]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: it is renamed first, so that none is ever found in part.

    Raises:
        OSError: If it cannot be renamed; what stays of the renamed one is no checkpoint.
    """
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.replace(removed)
    shutil.rmtree(removed, ignore_errors=True)


def list_leftovers(checkpoints: Path) -> list[Path]:
    """What a save or a removal leaves when it is killed, and has while it is under way."""
    if not checkpoints.is_dir():
        return []
    return sorted(folder for folder in checkpoints.iterdir() if _LEFT.fullmatch(folder.name))


def remove_leftovers(checkpoints: Path, spare: Collection[Path] = ()) -> None:
    """Remove what a killed run left in the middle of saving or removing; an old copy whose new one never came is put
    back.

    Args:
        checkpoints: The run's folder for them.
        spare: Leftovers to leave, because they may be of a save under way.
    """
    for folder in list_leftovers(checkpoints):
        if folder in spare:
            continue
        final = folder.with_suffix("")
        if folder.suffix == ".old" and not final.exists():
            folder.replace(final)
        else:
            shutil.rmtree(folder, ignore_errors=True)
