"""Going on from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_train.config.base import field_values
from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.config.root import Config
from moe_train.parallel.collectives import Group, gather_objects
from moe_train.train.agreement import attempt, together
from moe_train.train.checkpoint.files import verify_files
from moe_train.train.checkpoint.folders import list_checkpoints, point_latest, set_aside, step_folder, step_of
from moe_train.train.checkpoint.manifest import DamagedCheckpoint, Manifest, read_manifest

# What may differ from the checkpoint's configuration without being worth a word.
_UNREMARKABLE = ("train.run_dir", "checkpoint.resume", "train.log_every", "parallel.threads_per_rank", "data.cache_dir")
_MOST_SEQUENCES = 1 << 31  # of a step: a checkpoint that says more is not believed


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
        setting: checkpoint.resume. A path counts only until the run has a checkpoint of its own: the same command,
            started again, goes on from that.
        checkpoints: The run's folder for checkpoints.
        rank: This rank.
        world_size: Ranks.
        group: Of all ranks, which may wait long: ranks read at different speeds. None: the default one.

    Raises:
        UsageError: If it is not there or damaged, if no checkpoint of the folder is whole, or if the run would be
            written over.

    Collective: All ranks.
    """
    if setting == "never":
        present = gather_objects(list_checkpoints(checkpoints), group)[0]
        if present:
            raise UsageError(
                f"checkpoint.resume ('never') would write over {present[-1]}: choose another train.run_dir, or "
                "remove it"
            )
        return Found(None)
    if setting != "auto":
        return _find_named(setting, checkpoints, rank, world_size, group)
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
    """Rename the damaged checkpoints that are newer than the one found, let `latest` name that, and say so in a line
    each, on rank 0.

    Collective: All ranks.
    """

    def rename() -> list[str]:
        lines = []
        for damage in found.damaged:
            aside = set_aside(damage.folder)
            lines.append(f"warning: passed over: {damage.reason}; it is now {aside}")
        folder = found.manifest.folder if found.manifest is not None else None
        if folder is not None and list_checkpoints(folder.parent)[-1:] == [folder]:
            point_latest(folder)  # a kill may have come before it was
        return lines

    return together(lambda: rename() if rank == 0 else [])


def _read_whole(folder: Path, rank: int, world_size: int) -> Manifest:
    manifest = read_manifest(folder)
    expected = step_folder(folder.parent, manifest.step).name
    if folder.name.startswith("step_") and folder.name != expected:
        raise DamagedCheckpoint(f"{folder} holds the checkpoint of step {manifest.step}, whose folder is {expected}")
    verify_files(manifest, sorted(manifest.files)[rank::world_size])
    return manifest


def _find_named(setting: str, checkpoints: Path, rank: int, world_size: int, group: Group | None) -> Found:
    """A checkpoint by its path; or, where this run went on from it already, the newest that it has made since."""
    own = newest_whole(checkpoints, rank, world_size, group)
    if own.manifest is not None and _origin(own.manifest) == setting:
        return own

    def read() -> Manifest:
        folder = Path(setting)
        if not folder.is_dir():
            raise UsageError(
                f"checkpoint.resume ({setting!r}): no such folder; give auto, never or a checkpoint's folder"
            )
        manifest = _read_whole(folder, rank, world_size)
        others = [other for other in list_checkpoints(checkpoints) if not other.samefile(folder)]
        is_inside = folder.resolve().parent == checkpoints.resolve()
        if any(step_of(other) > manifest.step or not is_inside for other in others):
            raise UsageError(
                f"checkpoint.resume ({setting!r}) is of step {manifest.step}, but train.run_dir "
                f"({checkpoints.parent}) already has {others[-1].name}: choose another train.run_dir, or remove it"
            )
        return manifest

    return Found(together(read, group=group))


def _origin(manifest: Manifest) -> Any:
    section = manifest.config.get("checkpoint")
    return section.get("resume") if isinstance(section, dict) else None


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
    before, now = _meaning(manifest), _shape_fields(config.model)
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UsageError(
                f"{name} ({value}) differs from that of {manifest.folder} ({before[name]}), and gives its weights "
                "their meaning: set it to the same, or choose another train.run_dir for another model"
            )
    if manifest.tokenizer != tokenizer:
        raise UsageError(
            f"data.tokenizer ({config.data.tokenizer!r}) is another than that of {manifest.folder}: the same numbers "
            "would mean other text. A bpe is trained on the data, and changes with it"
        )


def _meaning(manifest: Manifest) -> dict[str, Any]:
    """What gives a checkpoint's weights their meaning; nothing where its configuration is of another version of this
    program: the shapes of the tensors are compared in any case."""
    try:
        return _shape_fields(ModelConfig.model_validate(manifest.config.get("model")))
    except ValidationError:
        return {}


def _shape_fields(model: ModelConfig) -> dict[str, Any]:
    """Fields of the model that a checkpoint's must equal, each with what it comes to where it is left out."""
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads")
    kinds = ("mixer", "qk_norm", "norm", "norm_position", "tie_embeddings")
    fields: dict[str, Any] = {f"model.{name}": getattr(model, name) for name in (*sizes, *kinds)}
    fields |= {
        "model.num_kv_heads": model.attention_kv_heads,
        "model.head_dim": model.attention_head_dim,
        "model.kv_layers": model.kv_owner_layers,
        "model.moe_layers": model.moe_layer_indices,
    }
    if len(model.moe_layer_indices) < model.num_layers:
        fields["model.intermediate_size"] = model.intermediate_size
    if model.moe_layer_indices:
        fields |= {
            f"model.moe.{name}": getattr(model.moe, name) for name in ("num_experts", "num_shared_experts", "router")
        }
        fields["model.moe.intermediate_size"] = model.expert_intermediate_size
    return fields


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
        return size if type(size) is int and 0 < size <= _MOST_SEQUENCES else None
    return None


def changed_fields(manifest: Manifest, config: Config) -> list[str]:
    """What differs from the checkpoint's configuration: "train.seed: 0 -> 1"."""
    before, now = dict(field_values(manifest.config)), dict(field_values(config.model_dump(mode="json")))
    changed = [name for name in now if name not in _UNREMARKABLE and before.get(name) != now[name]]
    return [f"{name}: {before.get(name)} -> {now[name]}" for name in changed]
