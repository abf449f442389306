"""Inventory of a run's folder of checkpoints, for users who look after them, also while a run is saving."""

import os
import stat
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moe_train.checkpoint.folders import LATEST, list_checkpoints, list_leftovers
from moe_train.checkpoint.manifest import MANIFEST, read_manifest, read_regular_file
from moe_train.config.errors import UsageError
from moe_train.config.paths import local_path

_LATEST_ATTEMPTS = 3  # `latest` is replaced shortly after its checkpoint has got its name
_LATEST_WAIT_SECONDS = 0.2
_LATEST_MOST_BYTES = 256


@dataclass(frozen=True)
class Entry:
    """One folder among the checkpoints.

    Attributes:
        name: Name of the folder.
        kind: "checkpoint"; "unfinished": from a save or removal that is under way or was killed; "set aside": found
            damaged and quarantined.
        step: Number of completed optimizer steps; None if the manifest cannot be read.
        num_bytes: Total size of the folder's files.
        written: Time when it was written, ISO 8601.
        layout: world_size, expert_parallel_size and zero_stage that wrote it; empty if not known.
        problem: What is wrong with the manifest; None: the manifest can be read.
        is_latest: Whether `latest` points to this folder.
    """

    name: str
    kind: str
    step: int | None
    num_bytes: int
    written: str
    layout: dict[str, int]
    problem: str | None
    is_latest: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def checkpoints_folder(run_dir: str, option: str = "RUN_DIR") -> Path:
    """Find the folder of a run's checkpoints.

    Args:
        run_dir: Folder of the run, or of its checkpoints.
        option: Name of this argument on the command line, for messages.

    Raises:
        UsageError: If the path is neither.
    """
    given = local_path(run_dir, option)
    inside = given / "checkpoints"
    if inside.is_dir():
        return inside
    if given.is_dir() and (given.name == "checkpoints" or list_checkpoints(given) or (given / LATEST).exists()):
        return given
    found = "has no checkpoints" if given.is_dir() else "is not a folder"
    raise UsageError(
        f"{option} ({run_dir!r}) {found}: give the train.run_dir of a run that has saved, or its checkpoints"
    )


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder looks like one checkpoint, damaged or not."""
    return path.is_dir() and (stat_of(path / MANIFEST) is not None or path.name.startswith("step_"))


def find_checkpoint_folder(path: str, option: str) -> Path:
    """Find a checkpoint's folder: the given one, or the newest one of the given run.

    Args:
        path: Folder of a checkpoint, of a run, or of a run's checkpoints, or `latest` in the last.
        option: Name of this argument on the command line, for messages.

    Raises:
        UsageError: If there is none.
    """
    given = local_path(path, option)
    if given.name == LATEST and given.is_file():
        given = given.parent / (named_by_latest(given.parent) or LATEST)
    if is_checkpoint(given):
        if stat_of(given / MANIFEST) is None:
            raise UsageError(f"{option} ({path!r}) has no {MANIFEST}: give a checkpoint that was completed")
        return given
    if not given.is_dir():
        what = "names no checkpoint that is there" if Path(path).name == LATEST else "is not a folder"
        raise UsageError(f"{option} ({path!r}) {what}: give a checkpoint (step_NNNNNNNN), or a run's folder")
    found = list_checkpoints(checkpoints_folder(str(given), option))
    if not found:
        raise UsageError(f"{option} ({path!r}) has no checkpoint: give the train.run_dir of a run that has saved")
    return found[-1]


def list_entries(checkpoints: Path) -> list[Entry]:
    """List every folder among the checkpoints, in the order of steps, without folders that vanish meanwhile."""
    latest = named_by_latest(checkpoints)
    kinds = {folder: "checkpoint" for folder in list_checkpoints(checkpoints)}
    kinds |= {folder: "unfinished" for folder in list_leftovers(checkpoints)}
    kinds |= {folder: "set aside" for folder in checkpoints.iterdir() if is_quarantined(folder)}
    entries = [_entry(folder, kind, latest) for folder, kind in sorted(kinds.items())]
    return [entry for entry in entries if entry is not None]


def is_quarantined(folder: Path) -> bool:
    """Return whether a folder was renamed because the checkpoint is damaged."""
    return folder.name.startswith("step_") and ".damaged" in folder.name


def _entry(folder: Path, kind: str, latest: str | None) -> Entry | None:
    step, layout, problem = None, {}, None
    if kind != "unfinished":
        try:
            manifest = read_manifest(folder)
            step, layout = manifest.step, manifest.layout
        except UsageError as error:
            problem = str(error)
    status = stat_of(folder / MANIFEST) or stat_of(folder)
    if status is None:
        return None
    written = datetime.fromtimestamp(status.st_mtime).astimezone().isoformat(timespec="seconds")
    num_bytes = folder_bytes(folder)
    return Entry(folder.name, kind, step, num_bytes, written, layout, problem, folder.name == latest)


def stat_of(path: Path) -> os.stat_result | None:
    """Return the status of a file, or of a link itself; None if it does not exist."""
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def folder_bytes(folder: Path) -> int:
    """Add up the bytes of the files in a folder that still exist."""
    return sum(status.st_size for status in file_statuses(folder) if stat.S_ISREG(status.st_mode))


def file_statuses(folder: Path) -> list[os.stat_result]:
    """Return the status of each file in a folder that still exists."""
    # os.walk ignores files that vanish; Path.rglob raises.
    found = [stat_of(Path(inside) / name) for inside, _, names in os.walk(folder) for name in names]
    return [status for status in found if status is not None]


def named_by_latest(checkpoints: Path) -> str | None:
    """Return the name in `latest`; None if the file does not exist or cannot be read."""
    try:
        return read_regular_file(checkpoints / LATEST, _LATEST_MOST_BYTES).strip()
    except (OSError, ValueError):
        return None


def check_latest(checkpoints: Path) -> str | None:
    """Check that `latest` holds the name of the newest checkpoint and a newline.

    Args:
        checkpoints: Folder of the run's checkpoints.

    Returns:
        What is wrong; None: nothing.
    """
    problem = _latest_problem(checkpoints)
    for _ in range(_LATEST_ATTEMPTS - 1):
        if problem is None:
            break
        time.sleep(_LATEST_WAIT_SECONDS)
        problem = _latest_problem(checkpoints)
    return problem


def _latest_problem(checkpoints: Path) -> str | None:
    path = checkpoints / LATEST
    try:
        text = read_regular_file(path, _LATEST_MOST_BYTES)
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    newest = [folder.name for folder in list_checkpoints(checkpoints)[-1:]]
    if newest and text != f"{newest[0]}\n":
        return f"{path} holds {text!r}, not the name of the newest checkpoint and a newline, {newest[0] + chr(10)!r}"
    return None if newest else f"{path} holds {text!r}, but there is no checkpoint"


def strays_among(checkpoints: Path) -> list[Path]:
    """List what does not belong in a folder of checkpoints."""
    present = list(checkpoints.iterdir())  # before the list of checkpoints, so that a new checkpoint is not a stray
    known = {*list_checkpoints(checkpoints), *list_leftovers(checkpoints)}
    known |= {checkpoints / LATEST, checkpoints / f"{LATEST}.part"}
    strays = [path for path in present if path not in known and not is_quarantined(path)]
    return sorted(path for path in strays if stat_of(path) is not None)
