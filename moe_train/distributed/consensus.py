"""Ranks that each find something out for themselves go on only if all found the same; else all end alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from moe_train.config.errors import UsageError
from moe_train.distributed.collectives import Group, gather_objects

Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """What a rank met.

    Attributes:
        rank: The rank.
        message: Of the error.
        kind: Its class.
    """

    rank: int
    message: str
    kind: type[Exception]


@dataclass(frozen=True)
class Attempt(Generic[Result]):
    """How something went that every rank did.

    Attributes:
        result: This rank's; None if it failed here.
        failure: Of the first rank that failed, the same on every rank; None: it went well everywhere.
    """

    result: Result | None
    failure: Failure | None


def try_on_all_ranks(action: Callable[[], Result], group: Group | None = None) -> Attempt[Result]:
    """Do something on every rank, and know on every rank whether it failed on one.

    Args:
        action: What each rank does; it may raise. It enters no collective.
        group: Of all ranks; None: the default one.

    Collective: All ranks.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # whatever it is: the other ranks wait in the next line
        name, is_usage = type(error).__name__, isinstance(error, UsageError)
        # What users and disks cause speaks for itself. A class that is not ours may not exist where others look for it.
        speaks = isinstance(error, UsageError | OSError) and bool(str(error))
        failure = (f"{error}" if speaks else f"{name}: {error}", type(error) if is_usage else RuntimeError)
    found = gather_objects(failure, group)
    first = next((Failure(rank, *failed) for rank, failed in enumerate(found) if failed is not None), None)
    return Attempt(result, first)


def run_on_all_ranks(
    action: Callable[[], Result],
    describe: Callable[[Result], dict[str, str]] | None = None,
    group: Group | None = None,
) -> Result:
    """Do something on every rank, and fail on every rank where it fails on one.

    A rank that raised alone would leave the others waiting in their next collective operation.

    Args:
        action: As in `try_on_all_ranks`.
        describe: Named parts of the result that must be the same on all ranks.
        group: As in `try_on_all_ranks`.

    Returns:
        This rank's result.

    Raises:
        UsageError: If a rank found one, or if the ranks' results differ; the same on every rank.
        RuntimeError: If a rank met another error, naming it.

    Collective: All ranks.
    """
    parts: dict[str, str] = {}

    def act() -> Result:
        result = action()
        if describe is not None:
            parts.update(describe(result))
        return result

    tried = try_on_all_ranks(act, group)
    if tried.failure is not None:
        failed = tried.failure
        is_usage = issubclass(failed.kind, UsageError)
        raise failed.kind(failed.message) if is_usage else RuntimeError(f"rank {failed.rank}: {failed.message}")
    if describe is not None:
        found = gather_objects(parts, group)
        for rank, others in enumerate(found):
            for name, value in found[0].items():
                if others[name] != value:
                    raise UsageError(f"{name} differs between ranks: {value} on rank 0, {others[name]} on rank {rank}")
    return tried.result  # type: ignore[return-value]  # no failure: the action has returned
