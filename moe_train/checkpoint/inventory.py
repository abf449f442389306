"""What lies in a run's folder of checkpoints: for people who look after them, also while a run is saving."""

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

_LATEST_ATTEMPTS = 3  # `latest` is replaced a moment after its checkpoint got its name
_LATEST_WAIT_SECONDS = 0.2
_LATEST_MOST_BYTES = 256


@dataclass(frozen=True)
class Entry:
    """A folder among the checkpoints.

    Attributes:
        name: Of the folder.
        kind: "checkpoint"; "unfinished": of a save or a removal under way or killed; "set aside": found damaged.
        step: Optimizer steps done; None if its manifest cannot be read.
        num_bytes: Of its files.
        written: When it was written, ISO 8601.
        layout: world_size, expert_parallel_size and zero_stage that wrote it; empty where it is not known.
        problem: What is wrong with its manifest; None: it can be read.
        is_latest: Whether `latest` names it.
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
        """Plain values for JSON."""
        return asdict(self)


def checkpoints_folder(run_dir: str, option: str = "RUN_DIR") -> Path:
    """The folder of checkpoints of a run.

    Args:
        run_dir: The run's folder, or that of its checkpoints.
        option: What the command line calls it, for messages.

    Raises:
        UsageError: If it is neither.
    """
    given = Path(run_dir)
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
    """Whether a folder is meant to be one checkpoint, damaged or not."""
    return path.is_dir() and (stat_of(path / MANIFEST) is not None or path.name.startswith("step_"))


def find_checkpoint_folder(path: str, option: str) -> Path:
    """A checkpoint's folder: the one given, or the newest of the run given.

    Args:
        path: As given.
        option: What the command line calls it, for messages.

    Raises:
        UsageError: If there is none.
    """
    given = Path(path)
    if is_checkpoint(given):
        if stat_of(given / MANIFEST) is None:
            raise UsageError(f"{option} ({path!r}) has no {MANIFEST}: give a checkpoint that was completed")
        return given
    if not given.is_dir():
        raise UsageError(f"{option} ({path!r}) is not a folder: give a checkpoint (step_NNNNNNNN), or a run's folder")
    found = list_checkpoints(checkpoints_folder(path, option))
    if not found:
        raise UsageError(f"{option} ({path!r}) has no checkpoint: give the train.run_dir of a run that has saved")
    return found[-1]


def list_entries(checkpoints: Path) -> list[Entry]:
    """Every folder among the checkpoints, in the order of steps; one that vanishes meanwhile is left out."""
    latest = named_by_latest(checkpoints)
    kinds = {folder: "checkpoint" for folder in list_checkpoints(checkpoints)}
    kinds |= {folder: "unfinished" for folder in list_leftovers(checkpoints)}
    kinds |= {folder: "set aside" for folder in checkpoints.iterdir() if is_quarantined(folder)}
    entries = [_entry(folder, kind, latest) for folder, kind in sorted(kinds.items())]
    return [entry for entry in entries if entry is not None]


def is_quarantined(folder: Path) -> bool:
    """Whether it was renamed because it is damaged."""
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
    """Status of a file or link itself; None if it is not there."""
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, as far as they are still there."""
    return sum(status.st_size for status in file_statuses(folder) if stat.S_ISREG(status.st_mode))


def file_statuses(folder: Path) -> list[os.stat_result]:
    """Of the files in a folder, as far as they are still there."""
    # os.walk passes over what vanishes; Path.rglob raises.
    found = [stat_of(Path(inside) / name) for inside, _, names in os.walk(folder) for name in names]
    return [status for status in found if status is not None]


def named_by_latest(checkpoints: Path) -> str | None:
    """The name in `latest`; None where there is none that can be read."""
    try:
        return read_regular_file(checkpoints / LATEST, _LATEST_MOST_BYTES).strip()
    except (OSError, ValueError):
        return None


def check_latest(checkpoints: Path) -> str | None:
    """What is wrong with `latest`, which holds the name of the newest checkpoint and a newline; None: nothing."""
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
    """What does not belong into a folder of checkpoints."""
    present = list(checkpoints.iterdir())  # before what is known of them, so that a new checkpoint is no stray
    known = {*list_checkpoints(checkpoints), *list_leftovers(checkpoints)}
    known |= {checkpoints / LATEST, checkpoints / f"{LATEST}.part"}
    strays = [path for path in present if path not in known and not is_quarantined(path)]
    return sorted(path for path in strays if stat_of(path) is not None)
