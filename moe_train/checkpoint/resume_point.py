"""Resume point of a run: the newest valid checkpoint, or the named one. Damaged checkpoints are quarantined."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.checkpoint.files import verify_files
from moe_train.checkpoint.folders import list_checkpoints, point_latest, quarantine, step_folder, step_of
from moe_train.checkpoint.inventory import find_checkpoint_folder
from moe_train.checkpoint.manifest import DamagedCheckpoint, Manifest, read_manifest
from moe_train.config.errors import UsageError
from moe_train.distributed.collectives import Group, gather_objects
from moe_train.distributed.consensus import run_on_all_ranks, try_on_all_ranks


@dataclass(frozen=True)
class Damage:
    """Damaged checkpoint that was passed over.

    Attributes:
        folder: Folder of the checkpoint.
        reason: What is wrong with it.
    """

    folder: Path
    reason: str


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint from which a run can resume.

    Attributes:
        manifest: Manifest of a checkpoint whose files are valid; None: start from step 0.
        damaged: Newer checkpoints that are not valid.
        initial: Manifest of a valid checkpoint whose weights alone are taken, if the run starts from step 0; None: the
            initial values.
    """

    manifest: Manifest | None
    damaged: tuple[Damage, ...] = ()
    initial: Manifest | None = None


def find_resume_point(
    setting: str, checkpoints: Path, rank: int, world_size: int, group: Group | None = None
) -> ResumePoint:
    """Find the checkpoint that checkpoint.resume names. All ranks together read all its bytes.

    Args:
        setting: checkpoint.resume. A path, in the way of --run, counts only until the run has a checkpoint of its own.
            The same command, started again, then resumes from the run's own checkpoint.
        checkpoints: Folder of the run's checkpoints.
        rank: Rank of this process.
        world_size: Number of ranks.
        group: All ranks, with a long timeout: ranks read at different speeds. None: the default group.

    Raises:
        UsageError: If the named checkpoint does not exist or is damaged, if no checkpoint of the folder is valid, or if
            the run would overwrite its checkpoints.

    Collective: All ranks.
    """
    if setting == "never":
        present = gather_objects(list_checkpoints(checkpoints), group)[0]
        if present:
            raise UsageError(
                f"checkpoint.resume ('never') would write over {present[-1]}: choose another train.run_dir, or "
                "remove it"
            )
        return ResumePoint(None)
    if setting != "auto":
        return _find_named(setting, checkpoints, rank, world_size, group)
    point = latest_valid_of_run(checkpoints, rank, world_size, group)
    if point.manifest is None and point.damaged:
        reasons = "; ".join(damage.reason for damage in point.damaged)
        raise UsageError(
            f"{checkpoints}: no checkpoint is whole ({reasons}): restore one, remove them to begin anew, or choose "
            "another train.run_dir"
        )
    return point


def find_initial_weights(setting: str, rank: int, world_size: int, group: Group | None = None) -> Manifest:
    """Find the checkpoint that checkpoint.init_from names. All ranks together read all its bytes.

    Args:
        setting: checkpoint.init_from.
        rank: Rank of this process.
        world_size: Number of ranks.
        group: All ranks, with a long timeout; None: the default group.

    Raises:
        UsageError: If it does not exist or is damaged.

    Collective: All ranks.
    """

    def read() -> Manifest:
        return _read_valid(find_checkpoint_folder(setting, "checkpoint.init_from"), rank, world_size)

    return run_on_all_ranks(read, group=group)


def latest_valid(checkpoints: Path, read: Callable[[Path], Manifest], group: Group | None = None) -> ResumePoint:
    """Find the newest valid checkpoint of a folder, and the newer checkpoints that are not valid.

    Args:
        checkpoints: Folder of the run's checkpoints.
        read: Called with a checkpoint's folder; verifies this rank's share of the files, and returns the manifest. It
            raises DamagedCheckpoint if the checkpoint is damaged.
        group: All ranks; None: the default group.

    Raises:
        UsageError: If `read` raised another UsageError, as for an unknown format version.

    Collective: All ranks, if there are several.
    """
    # Rank 0's view of the folder counts: a network file system may show other ranks an older state.
    names = gather_objects([folder.name for folder in list_checkpoints(checkpoints)], group)[0]
    damaged: list[Damage] = []
    for folder in (checkpoints / name for name in reversed(names)):
        tried = try_on_all_ranks(lambda folder=folder: read(folder), group)  # type: ignore[misc]
        if tried.failure is None:
            return ResumePoint(tried.result, tuple(damaged))
        if not issubclass(tried.failure.kind, DamagedCheckpoint):
            raise UsageError(tried.failure.message)
        damaged.append(Damage(folder, tried.failure.message))
    return ResumePoint(None, tuple(damaged))


def latest_valid_of_run(checkpoints: Path, rank: int, world_size: int, group: Group | None = None) -> ResumePoint:
    """Find the newest valid checkpoint of a run; every rank reads its share of the files.

    Args:
        checkpoints: Folder of the run's checkpoints.
        rank: Rank of this process.
        world_size: Number of ranks.
        group: All ranks; None: the default group.

    Collective: All ranks.
    """
    return latest_valid(checkpoints, lambda folder: _read_valid(folder, rank, world_size), group)


def quarantine_damaged(point: ResumePoint, rank: int) -> list[str]:
    """Quarantine the damaged checkpoints that are newer than the resume point, and make `latest` point to the latter.

    Args:
        point: Resume point of the run.
        rank: Rank of this process.

    Returns:
        One message per damaged checkpoint, on rank 0.

    Collective: All ranks.
    """

    def rename() -> list[str]:
        lines = []
        for damage in point.damaged:
            aside = quarantine(damage.folder)
            lines.append(f"warning: passed over: {damage.reason}; it is now {aside}")
        folder = point.manifest.folder if point.manifest is not None else None
        if folder is not None and list_checkpoints(folder.parent)[-1:] == [folder]:
            point_latest(folder)  # a kill may have prevented it
        return lines

    return run_on_all_ranks(lambda: rename() if rank == 0 else [])


def _read_valid(folder: Path, rank: int, world_size: int) -> Manifest:
    manifest = read_manifest(folder)
    expected = step_folder(folder.parent, manifest.step).name
    if folder.name.startswith("step_") and folder.name != expected:
        raise DamagedCheckpoint(f"{folder} holds the checkpoint of step {manifest.step}, whose folder is {expected}")
    verify_files(manifest, sorted(manifest.files)[rank::world_size])
    return manifest


def _find_named(setting: str, checkpoints: Path, rank: int, world_size: int, group: Group | None) -> ResumePoint:
    """Find a checkpoint by its path; if this run has resumed from it before, find the run's own newest one."""
    own = latest_valid_of_run(checkpoints, rank, world_size, group)
    if own.manifest is not None and _origin(own.manifest) == setting:
        return own

    def read() -> Manifest:
        folder = find_checkpoint_folder(setting, "checkpoint.resume")
        manifest = _read_valid(folder, rank, world_size)
        others = [other for other in list_checkpoints(checkpoints) if not other.samefile(folder)]
        is_inside = folder.resolve().parent == checkpoints.resolve()
        if any(step_of(other) > manifest.step or not is_inside for other in others):
            raise UsageError(
                f"checkpoint.resume ({setting!r}) is of step {manifest.step}, but train.run_dir "
                f"({checkpoints.parent}) already has {others[-1].name}: choose another train.run_dir, or remove it"
            )
        return manifest

    return ResumePoint(run_on_all_ranks(read, group=group))


def _origin(manifest: Manifest) -> Any:
    section = manifest.config.get("checkpoint")
    return section.get("resume") if isinstance(section, dict) else None
