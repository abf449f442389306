"""Ranks that each find something out for themselves go on only if all found the same; else all end alike."""

from collections.abc import Callable
from typing import TypeVar

from moe_train.config.errors import UsageError
from moe_train.parallel.collectives import gather_objects

Result = TypeVar("Result")


def together(action: Callable[[], Result], describe: Callable[[Result], dict[str, str]] | None = None) -> Result:
    """Do something on every rank, and fail on every rank where it fails on one.

    A rank that raised alone would leave the others waiting in their next collective operation.

    Args:
        action: What each rank does; it may raise UsageError, OSError or ValueError. It enters no collective.
        describe: Named parts of the result that must be the same on all ranks.

    Returns:
        This rank's result.

    Raises:
        UsageError: If a rank found one, or if the ranks' results differ; the same on every rank.
        RuntimeError: If a rank met another error, naming it.

    Collective: All ranks.
    """
    result, failure, parts = None, None, {}
    try:
        result = action()
        parts = describe(result) if describe is not None else {}
    except (UsageError, OSError, ValueError) as error:
        failure = (isinstance(error, UsageError), f"{error}" if str(error) else type(error).__name__)
    found = gather_objects((failure, parts))
    for rank, (failed, _) in enumerate(found):
        if failed is not None:
            is_usage, message = failed
            raise UsageError(message) if is_usage else RuntimeError(f"rank {rank}: {message}")
    for rank, (_, others) in enumerate(found):
        for name, value in found[0][1].items():
            if others[name] != value:
                raise UsageError(f"{name} differs between ranks: {value} on rank 0, {others[name]} on rank {rank}")
    return result  # type: ignore[return-value]  # no failure: the action has returned
