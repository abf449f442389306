"""Progress of a run, and what a checkpoint's progress is in a run with other sequences."""

from dataclasses import dataclass

from moe_train.checkpoint.manifest import Manifest
from moe_train.config.resolve import ResolvedConfig


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        consumed_sequences: Place in the data: sequences trained on or passed over.
    """

    step: int = 0
    consumed_sequences: int = 0

    def after(self, num_sequences: int) -> "Progress":
        """Return the progress after one more step of some sequences."""
        return Progress(self.step + 1, self.consumed_sequences + num_sequences)


def progress_at(manifest: Manifest, sequence_length: int) -> Progress:
    """Return the progress at a checkpoint, with its place in the data counted in sequences of this run.

    The place is kept in tokens: 96 sequences of 64 tokens are 24 of 256. What is left of a sequence counts as read.

    Args:
        manifest: Manifest of the checkpoint.
        sequence_length: Tokens per sequence of this run.
    """
    before = _saved(manifest, "sequence_length") or sequence_length
    return Progress(manifest.step, -(-manifest.consumed_sequences * before // sequence_length))


def describe_new_length(manifest: Manifest, config: ResolvedConfig) -> list[str]:
    """Say what follows from another train.sequence_length than the checkpoint's; empty if it is the same.

    Args:
        manifest: Manifest of the checkpoint.
        config: Configuration of this run.
    """
    length, before = config.train.sequence_length, _saved(manifest, "sequence_length")
    if before is None or before == length:
        return []
    place, batch = progress_at(manifest, length).consumed_sequences, _saved(manifest, "global_batch_size")
    lines = [
        f"place in the data: {manifest.consumed_sequences:,} sequences of {before:,} tokens are {place:,} of "
        f"{length:,}. Sequences of another length have another order: in the pass over the data that has begun some "
        "text is repeated, some is left out"
    ]
    now = config.train.global_batch_size * length
    if batch is not None and batch * before != now:
        lines.append(
            f"tokens of a step: {batch * before:,} -> {now:,} (train.global_batch_size x train.sequence_length)"
        )
    return lines


def _saved(manifest: Manifest, name: str) -> int | None:
    """Read a size from the train section of a checkpoint's configuration; None: an early version, which lacks it."""
    section = manifest.config.get("train")
    size = section.get(name) if isinstance(section, dict) else None
    return size if type(size) is int and size > 0 else None
