"""Going on from a checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.config.root import Config
from moe_train.parallel.collectives import Group, gather_objects
from moe_train.train.agreement import attempt, together
from moe_train.train.checkpoint.files import verify_files
from moe_train.train.checkpoint.folders import list_checkpoints, point_latest, set_aside, step_of
from moe_train.train.checkpoint.manifest import DamagedCheckpoint, Manifest, read_manifest

# What may differ from the checkpoint's configuration without being worth a word.
_UNREMARKABLE = ("train.run_dir", "checkpoint.resume", "train.log_every", "parallel.threads_per_rank", "data.cache_dir")
# What gives the weights their meaning: a checkpoint of another value is of another model.
_FIXED = (
    *(f"model.{name}" for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")),
    *(f"model.{name}" for name in ("kv_layers", "head_dim", "intermediate_size", "moe_every", "moe_layers", "mixer")),
    *(f"model.{name}" for name in ("norm", "norm_position", "tie_embeddings")),
    *(f"model.moe.{name}" for name in ("num_experts", "intermediate_size", "num_shared_experts", "router")),
)


@dataclass(frozen=True)
class Damage:
    """A checkpoint that was passed over.

    Attributes:
        folder: Where it is.
        reason: What is wrong with it.
    """

    folder: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """What a run can go on from.

    Attributes:
        manifest: Of a checkpoint whose files are whole; None: begin anew.
        damaged: Newer ones that are not.
    """

    manifest: Manifest | None
    damaged: tuple[Damage, ...] = ()


def find_checkpoint(setting: str, checkpoints: Path, rank: int, world_size: int, group: Group | None = None) -> Found:
    """The checkpoint that checkpoint.resume names. All its bytes are read, by all ranks together.

    Args:
        setting: checkpoint.resume.
        checkpoints: The run's folder for checkpoints.
        rank: This rank.
        world_size: Ranks.
        group: Of all ranks, which may wait long: ranks read at different speeds. None: the default one.

    Raises:
        UsageError: If it is not there or damaged, if no checkpoint of the folder is whole, or if the run would be
            written over.

    Collective: All ranks.
    """
    present = list_checkpoints(checkpoints)
    if setting == "never" and present:
        raise UsageError(
            f"checkpoint.resume ('never') would write over {present[-1]}: choose another train.run_dir, or remove it"
        )
    if setting == "never":
        return Found(None)
    if setting != "auto":
        return Found(_read_named(Path(setting), checkpoints, rank, world_size, group))
    found = newest_whole(checkpoints, rank, world_size, group)
    if found.manifest is None and found.damaged:
        reasons = "; ".join(damage.reason for damage in found.damaged)
        raise UsageError(
            f"{checkpoints}: no checkpoint is whole ({reasons}): restore one, remove them to begin anew, or choose "
            "another train.run_dir"
        )
    return found


def newest_whole(checkpoints: Path, rank: int, world_size: int, group: Group | None = None) -> Found:
    """The newest checkpoint of a folder that is whole, and the newer ones that are not.

    Raises:
        UsageError: If one is of another format version.

    Collective: All ranks.
    """
    # As rank 0 sees the folder: a network file system may show other ranks an older state of it.
    names = gather_objects([folder.name for folder in list_checkpoints(checkpoints)], group)[0]
    damaged: list[Damage] = []
    for folder in (checkpoints / name for name in reversed(names)):
        tried = attempt(lambda folder=folder: _read_whole(folder, rank, world_size), group)  # type: ignore[misc]
        if tried.failure is None:
            return Found(tried.result, tuple(damaged))
        if not issubclass(tried.failure.kind, DamagedCheckpoint):
            raise UsageError(tried.failure.message)
        damaged.append(Damage(folder, tried.failure.message))
    return Found(None, tuple(damaged))


def set_damaged_aside(found: Found, rank: int) -> list[str]:
    """Rename the damaged checkpoints that are newer than the one found, and say so in a line each, on rank 0.

    Collective: All ranks.
    """

    def rename() -> list[str]:
        lines = []
        for damage in found.damaged:
            aside = set_aside(damage.folder)
            lines.append(f"warning: passed over: {damage.reason}; it is now {aside}")
        if found.damaged and found.manifest is not None:
            point_latest(found.manifest.folder)
        return lines

    return together(lambda: rename() if rank == 0 else [])


def _read_whole(folder: Path, rank: int, world_size: int) -> Manifest:
    manifest = read_manifest(folder)
    verify_files(manifest, sorted(manifest.files)[rank::world_size])
    return manifest


def _read_named(folder: Path, checkpoints: Path, rank: int, world_size: int, group: Group | None) -> Manifest:
    def read() -> Manifest:
        if not folder.is_dir():
            raise UsageError(
                f"checkpoint.resume ({str(folder)!r}): no such folder; give auto, never or a checkpoint's folder"
            )
        manifest = _read_whole(folder, rank, world_size)
        newer = [other for other in list_checkpoints(checkpoints) if step_of(other) > manifest.step]
        if newer:
            raise UsageError(
                f"checkpoint.resume ({str(folder)!r}) is of step {manifest.step}, but train.run_dir "
                f"({checkpoints.parent}) already has {newer[-1].name}: choose another train.run_dir, or remove it"
            )
        return manifest

    return together(read, group=group)


def check_resumable(manifest: Manifest, config: Config, tokenizer: str) -> None:
    """Refuse to go on with what would give the numbers in the checkpoint another meaning.

    Args:
        manifest: Of the checkpoint.
        config: Of this run.
        tokenizer: Fingerprint of this run's tokenizer.

    Raises:
        UsageError: If a field of the model's shape or the tokenizer differs, or the run has fewer steps.
    """
    if manifest.step > config.train.steps:
        raise UsageError(f"train.steps ({config.train.steps}) is below the step of {manifest.folder} ({manifest.step})")
    before, now = dict(field_values(manifest.config)), dict(field_values(config.model_dump(mode="json")))
    for name in _FIXED:
        if name in before and before[name] != now[name]:
            raise UsageError(
                f"{name} ({now[name]}) differs from that of {manifest.folder} ({before[name]}), and gives its weights "
                "their meaning: set it to the same, or choose another train.run_dir for another model"
            )
    if manifest.tokenizer != tokenizer:
        raise UsageError(
            f"data.tokenizer ({config.data.tokenizer!r}) is another than that of {manifest.folder}: the same numbers "
            "would mean other text. A bpe is trained on the data, and changes with it"
        )


def saved_global_batch_size(setting: str, checkpoints: Path) -> int | None:
    """Sequences of a step in the newest checkpoint that a run would go on from: the default where none is given, so
    that a run goes on with the same steps on another number of ranks. None where there is no readable checkpoint.
    """
    folders = list(reversed(list_checkpoints(checkpoints))) if setting == "auto" else []
    if setting not in ("auto", "never"):
        folders = [Path(setting)]
    for folder in folders:
        try:
            size = read_manifest(folder).config["train"]["global_batch_size"]
        except (UsageError, LookupError, TypeError):
            continue  # said when it is looked for in earnest
        return size if isinstance(size, int) else None
    return None


def changed_fields(manifest: Manifest, config: Config) -> list[str]:
    """What differs from the checkpoint's configuration: "train.seed: 0 -> 1"."""
    before, now = dict(field_values(manifest.config)), dict(field_values(config.model_dump(mode="json")))
    changed = [name for name in now if name not in _UNREMARKABLE and before.get(name) != now[name]]
    return [f"{name}: {before.get(name)} -> {now[name]}" for name in changed]


def field_values(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a configuration's plain values by its dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from field_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
