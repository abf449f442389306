"""Verification of checkpoints: every byte of their files is read and compared with what was written."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_train.checkpoint.files import Advance, check_files
from moe_train.checkpoint.folders import step_folder
from moe_train.checkpoint.inventory import check_latest, strays_among
from moe_train.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest, read_manifest
from moe_train.config.errors import UsageError


@dataclass(frozen=True)
class FileVerdict:
    """Verdict on one file.

    Attributes:
        path: Path of the file.
        problem: What is wrong, with the name of the file; None: the file is as it was written.
    """

    path: str
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Verification:
    """Verdicts on a checkpoint, or on what lies beside a run's checkpoints.

    Attributes:
        folder: Checkpoint, or folder of checkpoints.
        verdicts: Verdict on every file.
        has_vanished: Whether the folder was removed or replaced meanwhile, as by a run that is saving.
    """

    folder: str
    verdicts: tuple[FileVerdict, ...]
    has_vanished: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether no damage was found."""
        return self.has_vanished or all(verdict.problem is None for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        files = [verdict.as_dict() for verdict in self.verdicts]
        return {"folder": self.folder, "whole": self.is_whole, "vanished": self.has_vanished, "files": files}


def verify_checkpoint(folder: Path, advance: Advance | None = None) -> Verification:
    """Verify a complete checkpoint: its manifest, every file that the manifest names, and that there are no others.

    Args:
        folder: Folder of the checkpoint.
        advance: Called after each block with the number of bytes read.

    Raises:
        UsageError: If it has another format version.
    """
    before = _identity(folder)
    verdicts = tuple(_verdicts(folder, advance))
    is_same = before is not None and _identity(folder) == before
    has_vanished = not is_same and any(verdict.problem for verdict in verdicts)
    return Verification(str(folder), verdicts, has_vanished)


def _verdicts(folder: Path, advance: Advance | None) -> list[FileVerdict]:
    path = folder / MANIFEST
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpoint as error:
        return [FileVerdict(str(path), str(error))]
    problem = None
    expected = step_folder(folder.parent, manifest.step).name
    if folder.name.startswith("step_") and folder.name.partition(".")[0] != expected:
        problem = f"{path} is of step {manifest.step}, whose folder is {expected}"
    verdicts = [FileVerdict(str(path), problem)]
    for file, damage in check_files(manifest, manifest.files, advance):
        verdicts.append(FileVerdict(str(folder / file), str(damage) if damage else None))
    return [*verdicts, *_stray_verdicts(_strays_in(folder, manifest))]


def _strays_in(folder: Path, manifest: Manifest) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name not in {MANIFEST, *manifest.files})
    except FileNotFoundError:
        return []


def _stray_verdicts(strays: Iterable[Path]) -> list[FileVerdict]:
    return [FileVerdict(str(path), f"{path} is no part of a checkpoint: move it away") for path in strays]


def verify_surroundings(checkpoints: Path) -> Verification:
    """Verify that `latest` names the newest checkpoint, and that only checkpoints lie beside it."""
    latest = FileVerdict(str(checkpoints / "latest"), check_latest(checkpoints))
    return Verification(str(checkpoints), (latest, *_stray_verdicts(strays_among(checkpoints))))


def readable_bytes(folders: Iterable[Path]) -> int:
    """Count the bytes that verifying some checkpoints will read, as far as their manifests can be read."""
    total = 0
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            total += sum((folder / file).lstat().st_size for file in manifest.files)
        except (UsageError, OSError):
            continue  # verification will report it
    return total


def read_verified(folder: Path, advance: Advance | None = None) -> Manifest:
    """Verify a checkpoint, and return its manifest.

    Args:
        folder: Folder of the checkpoint.
        advance: Called after each block with the number of bytes read.

    Raises:
        DamagedCheckpoint: If a file is not as it was written, or another file lies in the folder.
    """
    found = verify_checkpoint(folder, advance)
    if found.has_vanished:
        raise DamagedCheckpoint(f"{folder} was removed while it was read")
    for verdict in found.verdicts:
        if verdict.problem is not None:
            raise DamagedCheckpoint(verdict.problem)
    return read_manifest(folder)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
