"""Checks of context parallelism: what its size must divide, and which settings do not work with it.

What a mixer or a dense feed-forward layer refuses is said in its own file, and checked by `parts.Kinds`.
"""

from collections.abc import Iterator

from moe_train.config.errors import UsageError
from moe_train.config.root import Config


def sequence_readers(config: Config, world_size: int) -> tuple[int, str]:
    """Count the ranks with sequences of their own; ranks that share sequences count as one.

    Args:
        config: Configuration as loaded.
        world_size: Number of ranks.

    Returns:
        The number, and a note for messages that name it; empty if all ranks count.
    """
    size = config.parallel.context_parallel_size
    note = (
        "" if size == 1 else f", where parallel.context_parallel_size ({size}) ranks share sequences and count as one"
    )
    return world_size // size, note


def check_context(config: Config, world_size: int) -> None:
    """Refuse a number of ranks for each sequence that cannot work.

    Args:
        config: Configuration as loaded.
        world_size: Number of ranks.

    Raises:
        UsageError: If sizes do not divide each other, or a setting would see only a rank's part of a sequence.
    """
    size, length = config.parallel.context_parallel_size, config.train.sequence_length
    if world_size % size:
        raise UsageError(
            f"world size ({world_size}) must be divisible by parallel.context_parallel_size ({size}): start {size} "
            "ranks or a multiple"
        )
    if size == 1:
        return
    if length % (2 * size):
        raise UsageError(
            f"train.sequence_length ({length}) must be divisible by 2 x parallel.context_parallel_size "
            f"(2 x {size} = {2 * size}): each rank has two chunks of every sequence"
        )
    for setting, instead in _refused(config):
        raise UsageError(f"{setting} does not work with parallel.context_parallel_size ({size}): {instead}")


def _refused(config: Config) -> Iterator[tuple[str, str]]:
    """Yield settings, with their values, whose numbers would depend on how ranks share a sequence, and what to do."""
    copies, moe = config.model.hidden_copies.copies, config.model.moe
    if copies > 1:
        yield f"model.hidden_copies.copies ({copies})", "hidden copies see those of positions that other ranks have"
    if config.train.compile:
        yield f"train.compile ({config.train.compile})", "attention waits for other ranks in its middle"
    if not config.model.moe_layer_indices:
        return
    for name in ("capacity_factor", "eval_capacity_factor"):
        if getattr(moe, name) is not None:
            yield (
                f"model.moe.{name} ({getattr(moe, name)})",
                "it counts the tokens of whole sequences, and a rank has a part; leave it out: dropless",
            )
    if moe.balance_scope == "rank" and (moe.importance_cv2_coef or moe.load_cv2_coef):
        yield f"model.moe.balance_scope ({moe.balance_scope!r})", "it would see a part of each sequence; take step"
    if moe.switch_scope == "micro_batch" and moe.switch_aux_coef:
        yield f"model.moe.switch_scope ({moe.switch_scope!r})", "it would see a part of each sequence; take sequence"
