"""Consensus of ranks: each tries something by itself; all continue only if all succeeded alike, otherwise all fail."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from moe_train.config.errors import UsageError
from moe_train.distributed.collectives import Group, gather_objects

Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Error that a rank met.

    Attributes:
        rank: Rank that failed.
        message: Message of the error.
        kind: Class of the error.
    """

    rank: int
    message: str
    kind: type[Exception]


@dataclass(frozen=True)
class Attempt(Generic[Result]):
    """Outcome of an action that every rank tried.

    Attributes:
        result: Result of this rank; None if it failed here.
        failure: Failure of the first rank that failed, the same on every rank; None: no rank failed.
    """

    result: Result | None
    failure: Failure | None


def try_on_all_ranks(action: Callable[[], Result], group: Group | None = None) -> Attempt[Result]:
    """Try an action on every rank, and tell every rank whether it failed on one.

    Args:
        action: Called on each rank; it may raise, but must not enter a collective.
        group: Group of all ranks; None: the default group.

    Collective: All ranks.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # any error: the other ranks wait in gather_objects below
        name, is_usage = type(error).__name__, isinstance(error, UsageError)
        # Errors of users and disks need no class name. A class of another package may not exist on the other ranks.
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
    """Run an action on every rank, and raise on every rank if it fails on one.

    If one rank raised alone, the others would wait for it in their next collective operation.

    Args:
        action: Called on each rank; it may raise, but must not enter a collective.
        describe: Called with the result; returns named parts of it that must be the same on all ranks.
        group: Group of all ranks; None: the default group.

    Returns:
        Result of this rank.

    Raises:
        UsageError: On every rank, if a rank raised one, or if the described parts differ between ranks.
        RuntimeError: On every rank, if a rank raised another error; it names that rank.

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
    return tried.result  # type: ignore[return-value]  # no failure, so the action has returned a result
