"""Going on from a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.config.root import Config
from moe_train.train.checkpoint import list_checkpoints
from moe_train.train.manifest import Manifest, read_manifest
from moe_train.train.run_folder import RunFolder

# What may differ from the checkpoint's configuration without being worth a word.
_UNREMARKABLE = ("train.run_dir", "checkpoint.resume", "train.log_every", "parallel.threads_per_rank", "data.cache_dir")


def find_checkpoint(config: Config, folder: RunFolder) -> Manifest | None:
    """The checkpoint that checkpoint.resume names, or None to begin anew.

    Raises:
        UsageError: If it is not there, damaged, or does not fit the run.
    """
    setting, found = config.checkpoint.resume, list_checkpoints(folder.checkpoints)
    if setting == "never":
        if found:
            raise UsageError(
                f"checkpoint.resume ('never') would write over {found[-1]}: choose another train.run_dir, or remove it"
            )
        return None
    if setting == "auto":
        if not found:
            return None
        manifest = read_manifest(found[-1])
    else:
        if not Path(setting).is_dir():
            raise UsageError(
                f"checkpoint.resume ({setting!r}): no such folder; give auto, never or a checkpoint's folder"
            )
        manifest = read_manifest(Path(setting))
        newer = [other for other in found if read_manifest(other).step > manifest.step]
        if newer:
            raise UsageError(
                f"checkpoint.resume ({setting!r}) is of step {manifest.step}, but train.run_dir ({folder.root}) "
                f"already has {newer[-1].name}: choose another train.run_dir, or remove it"
            )
    if manifest.step > config.train.steps:
        raise UsageError(f"train.steps ({config.train.steps}) is below the step of {manifest.folder} ({manifest.step})")
    return manifest


def check_resumable(manifest: Manifest, config: Config, tokenizer: str) -> None:
    """Refuse to go on with what would give the numbers in the checkpoint another meaning.

    Args:
        manifest: Of the checkpoint.
        config: Of this run.
        tokenizer: Fingerprint of this run's tokenizer.

    Raises:
        UsageError: If the tokenizer or the batch differs.
    """
    if manifest.tokenizer != tokenizer:
        raise UsageError(
            f"data.tokenizer ({config.data.tokenizer!r}) is another than that of {manifest.folder}: the same numbers "
            "would mean other text. A bpe is trained on the data, and changes with it"
        )
    # The place in the data is step x global_batch_size: with another size, sequences would be left out or seen twice.
    consumed, batch = manifest.consumed_sequences, config.train.global_batch_size
    assert batch is not None
    if consumed != manifest.step * batch:
        raise UsageError(
            f"train.global_batch_size ({batch}) differs from that of {manifest.folder} "
            f"({consumed // max(1, manifest.step)}): set train.global_batch_size to it"
        )


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
