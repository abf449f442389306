"""Checks of a run that resumes from a checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.inventory import find_checkpoint_folder
from moe_train.checkpoint.manifest import Manifest, read_manifest
from moe_train.config.base import field_values
from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.config.resolve import ResolvedConfig
from moe_train.config.root import Config
from moe_train.data.identity import SourceIdentity, data_changes
from moe_train.model.build import mixer_of
from moe_train.model.moe.balance.build import split_settings
from moe_train.model.moe.routers.build import router_shapes
from moe_train.train.progress import describe_new_length

# Fields whose changes since the checkpoint are not reported.
_UNREMARKABLE = ("train.run_dir", "checkpoint.resume", "train.log_every", "parallel.threads_per_rank", "data.cache_dir")
_MOST_SEQUENCES = 1 << 31  # most sequences of a step; a checkpoint that says more is not believed


def check_resumable(manifest: Manifest, config: ResolvedConfig, tokenizer: str) -> None:
    """Refuse a configuration or tokenizer that would give the numbers in the checkpoint another meaning.

    Args:
        manifest: Manifest of the checkpoint.
        config: Configuration of this run.
        tokenizer: Fingerprint of this run's tokenizer.

    Raises:
        UsageError: If a field of the model's shape or the tokenizer differs, or the run has fewer steps.
    """
    if manifest.step > config.train.steps:
        raise UsageError(f"train.steps ({config.train.steps}) is below the step of {manifest.folder} ({manifest.step})")
    check_same_meaning(manifest, config, tokenizer)


def check_same_meaning(manifest: Manifest, config: ResolvedConfig, tokenizer: str) -> None:
    """Refuse a configuration or tokenizer that would give a checkpoint's weights another meaning.

    Args:
        manifest: Manifest of the checkpoint.
        config: Configuration of this run.
        tokenizer: Fingerprint of this run's tokenizer.

    Raises:
        UsageError: If a field of the model's shape or the tokenizer differs.
    """
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
    """Return the fields that give a checkpoint's weights their meaning.

    There are none if another version of this program wrote the configuration; the shapes of the tensors are compared in
    any case.
    """
    try:
        return _shape_fields(ModelConfig.model_validate(manifest.config.get("model")))
    except (ValidationError, UsageError):
        return {}


def _shape_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of the model that must equal those of a checkpoint, with the values that None stands for."""
    names = ("vocab_size", "hidden_size", "num_layers", "norm", "norm_position", "tie_embeddings")
    fields: dict[str, Any] = {f"model.{name}": getattr(model, name) for name in names}
    fields["model.mixers"] = model.layer_mixers
    for layer in (model.layer_mixers.index(name) for name in dict.fromkeys(model.layer_mixers)):
        kind, spec = mixer_of(model, layer)
        fields |= kind.shapes(model, spec.section)
    fields["model.moe_layers"] = model.moe_layer_indices
    if len(model.moe_layer_indices) < model.num_layers:
        fields |= {f"model.{name}": getattr(model, name) for name in ("intermediate_size", "feed_forward")}
    if model.moe_layer_indices:
        fields |= {
            f"model.moe.{name}": getattr(model.moe, name) for name in ("num_experts", "num_shared_experts", "router")
        }
        fields["model.moe.intermediate_size"] = model.expert_intermediate_size
        fields |= router_shapes(model.moe)
    return fields


def saved_global_batch(setting: str, checkpoints: Path) -> tuple[int, Path] | None:
    """Read the global batch size of the newest checkpoint that a run would resume from, with its folder.

    It is the default if no global batch size is given, so that steps stay the same on another number of ranks.

    Args:
        setting: checkpoint.resume.
        checkpoints: Folder of the run's checkpoints.

    Returns:
        The size and the checkpoint's folder; None: there is no readable checkpoint.
    """
    try:
        is_named = setting not in ("auto", "never")
        named = [find_checkpoint_folder(setting, "checkpoint.resume")] if is_named else []
    except UsageError:
        return None  # reported later, when the checkpoint is loaded
    for folder in named or (list(reversed(list_checkpoints(checkpoints))) if setting == "auto" else []):
        try:
            size = read_manifest(folder).config["train"]["global_batch_size"]
        except (UsageError, LookupError, TypeError):
            continue  # reported later, too
        return (size, folder) if type(size) is int and 0 < size <= _MOST_SEQUENCES else None
    return None


def changed_data(manifest: Manifest, sources: Sequence[SourceIdentity]) -> list[str]:
    """List how the data differs from that of the checkpoint, and what follows; empty if it is the same.

    Args:
        manifest: Manifest of the checkpoint; an old one knows nothing of its data.
        sources: Sources of this run.
    """
    try:
        before = [SourceIdentity.from_json(value) for value in manifest.data]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return [f"the data of {manifest.folder} is described in a form that this version cannot read: not compared"]
    changes = data_changes(before, sources)
    if changes:
        changes.append(
            "the order of the data is another from here on: some text is repeated, some is left out. For the same "
            "order put the data back; to train on new data from its start give a new train.run_dir"
        )
    return changes


def split_warnings(config: ResolvedConfig, manifest: Manifest | None) -> list[str]:
    """Warn of balance losses that depend on how a step is split into micro-batches, if the split matters here.

    Args:
        config: Configuration of this run.
        manifest: Manifest of the checkpoint that it resumes from; None: it starts anew.

    Returns:
        A warning where accumulation is above 1, and another where it is not that of the checkpoint.
    """
    settings = split_settings(config.model.moe)
    if not settings:
        return []
    now, before = config.accumulation, _accumulation(manifest) if manifest is not None else None
    verb = "make" if len(settings) > 1 else "makes"
    depends = f"{' and '.join(settings)} {verb} the objective depend on it; scope step does not"
    warnings = [f"a step has {now} micro-batches per rank: {depends}"] if now > 1 else []
    if manifest is not None and before is not None and before != now:
        warnings.append(
            f"{manifest.folder} was trained with {before} micro-batches per rank in a step, this run has {now}: "
            f"{depends}"
        )
    return warnings


def _accumulation(manifest: Manifest) -> int | None:
    """Compute the micro-batches per rank and step of a checkpoint's run; None: it does not say."""
    try:
        train = manifest.config["train"]
        readers = manifest.layout["world_size"] // manifest.layout.get("context_parallel_size", 1)
        return int(train["global_batch_size"]) // (int(train["micro_batch_size"]) * readers)
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        return None  # written by an early version


def changed_fields(manifest: Manifest, config: ResolvedConfig) -> list[str]:
    """List the fields that differ from the checkpoint's configuration, such as "train.seed: 0 -> 1"."""
    before, now = _fields_before(manifest), dict(field_values(config.model_dump(mode="json")))
    changed = [name for name in now if name not in _UNREMARKABLE and before.get(name) != now[name]]
    return [f"{name}: {before.get(name)} -> {now[name]}" for name in changed]


def _fields_before(manifest: Manifest) -> dict[str, Any]:
    """Return a checkpoint's fields by their present names, with the defaults of fields that are new.

    They are as they were written if another version of this program wrote them, and they mean nothing to this one.
    """
    try:
        values = Config.model_validate(manifest.config).model_dump(mode="json")
    except (ValidationError, UsageError):
        values = manifest.config
    return dict(field_values(values))


def describe_changes(manifest: Manifest, config: ResolvedConfig, sources: Sequence[SourceIdentity]) -> Iterator[str]:
    """Yield a line for each difference between a checkpoint and the run that resumes from it, and for what follows.

    Args:
        manifest: Manifest of the checkpoint.
        config: Configuration of this run.
        sources: Sources of data of this run.
    """
    yield from (f"changed since: {change}" for change in changed_fields(manifest, config))
    if config.optim.name != manifest.optimizer:
        yield f"the moments of {config.optim.name} start at zero"
    yield from describe_new_length(manifest, config)
    yield from (f"data changed since: {change}" for change in changed_data(manifest, sources))
