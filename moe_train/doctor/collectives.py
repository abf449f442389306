"""Checks and timings of collective operations: whether their results are right, and how long they take by size."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_train.doctor.operations import DTYPES, OPERATIONS, Prepared, prepare
from moe_train.doctor.scopes import Scope, align, largest

_CHECKED_BYTES = 4096 * 8  # size of a rank's buffer in each dtype
_SHORT_BYTES = 2**16  # on CUDA, operations up to this size run several times in a row: a start takes long
_IN_A_ROW = 8
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 15
_CHOICE_SHARE = 0.6  # share of the time budget for finding out which sizes are short enough

Mark = Callable[[str], None]  # called with a description of what comes next, before it starts


@dataclass(frozen=True)
class Timing:
    """Time of one operation at one size in one scope.

    Attributes:
        operation: One of OPERATIONS.
        scope: One of SCOPES.
        bytes: Size of a rank's whole buffer.
        sent_bytes: Bytes that a rank sends to other ranks.
        seconds: Time of the slowest rank, median over the rounds; then median over the groups of the scope.
        correct: Whether every rank had the right result.
    """

    operation: str
    scope: str
    bytes: int
    sent_bytes: float
    seconds: float
    correct: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the rate in bytes per second."""
        return asdict(self) | {"bytes_per_second": self.sent_bytes / self.seconds}


def check_collectives(scope: Scope, device: torch.device, mark: Mark) -> list[str]:
    """Run every operation in every dtype, and compare the results with the known right ones.

    Args:
        scope: Scope with this rank's group.
        device: Device of this rank.
        mark: Called with a description of each operation, before it starts.

    Returns:
        Operations with a wrong result on this rank, such as "all_to_all of bfloat16".

    Collective: All ranks of the scope's group.
    """
    wrong = []
    for operation in OPERATIONS:
        for dtype in DTYPES:
            mark(f"{operation} of {_name(dtype)} {_words(scope)}")
            if scope.group is None:
                continue
            for uneven in (True, False) if operation == "all_to_all" else (False,):
                prepared = prepare(operation, _CHECKED_BYTES, dtype, device, scope.group, uneven)
                prepared.run()
                if not prepared.is_right():
                    wrong.append(f"{operation} of {_name(dtype)}{' in uneven blocks' if uneven else ''}")
    return wrong


def time_collectives(
    scope: Scope, sizes: Sequence[int], device: torch.device, budget_seconds: float, mark: Mark
) -> list[Timing]:
    """Time every operation at every size, in rounds over all of them, until the budget is spent.

    Args:
        scope: Scope with this rank's group.
        sizes: Sizes of a rank's buffer in bytes, ascending. Sizes that would take too long are left out.
        device: Device of this rank.
        budget_seconds: Approximate time for all of it.
        mark: Called with a description of each round or operation, before it starts.

    Returns:
        Timings, the same on all ranks of the group except for `correct`, which is about this rank alone.

    Collective: All ranks of the scope's group.
    """
    mark(f"the collective operations {_words(scope)}")
    if scope.group is None:
        return []
    began = time.perf_counter()
    chosen = _choose(scope, sizes, device, _CHOICE_SHARE * budget_seconds, mark)
    times = _IN_A_ROW if device.type == "cuda" else 1
    rounds: list[list[float]] = []
    while len(rounds) < _MOST_ROUNDS:
        mark(f"round {len(rounds) + 1} of the collective operations {_words(scope)}")
        rounds.append([])
        for (_, num_bytes), (prepared, _) in chosen.items():
            align(scope.group)
            rounds[-1].append(_seconds(prepared, times if num_bytes <= _SHORT_BYTES else 1, device))
        if largest(time.perf_counter() - began, scope.group) > budget_seconds and len(rounds) >= _LEAST_ROUNDS:
            break
    table = torch.tensor(rounds, dtype=torch.float64)
    torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX, group=scope.group)
    timings = []
    for place, ((operation, num_bytes), (prepared, is_right)) in enumerate(chosen.items()):
        seconds = statistics.median(table[:, place].tolist())
        timings.append(Timing(operation, scope.name, num_bytes, prepared.sent_bytes, seconds, is_right))
    return timings


def _choose(
    scope: Scope, sizes: Sequence[int], device: torch.device, most_seconds: float, mark: Mark
) -> dict[tuple[str, int], tuple[Prepared, bool]]:
    """Choose the sizes that are short enough. Each runs twice: the first run sets up, and its result is checked."""
    assert scope.group is not None
    chosen: dict[tuple[str, int], tuple[Prepared, bool]] = {}
    spent, taken = 0.0, dict.fromkeys(OPERATIONS, 0.0)
    before = dict.fromkeys(OPERATIONS, 0)
    for num_bytes in sorted(sizes):
        for operation in OPERATIONS:
            expected = taken[operation] * num_bytes / max(1, before[operation])
            # The shortest size always runs. All ranks of the group decide alike, by the slowest rank's times.
            if before[operation] and spent + 2 * expected > most_seconds:
                continue
            mark(f"{operation} of {num_bytes} bytes {_words(scope)}")
            prepared = prepare(operation, num_bytes, torch.float32, device, scope.group)
            seconds = _seconds(prepared, 1, device)
            is_right = prepared.is_right()
            taken[operation] = largest(min(seconds, _seconds(prepared, 1, device)), scope.group)
            spent, before[operation] = spent + 2 * taken[operation], num_bytes
            chosen[operation, num_bytes] = (prepared, is_right)
    return chosen


def _seconds(prepared: Prepared, times: int, device: torch.device) -> float:
    """Return the seconds of one run. Host synchronisation on CUDA: the clock must not stop before the work is done."""
    _finish(device)
    began = time.perf_counter()
    for _ in range(times):
        prepared.run()
    _finish(device)
    return (time.perf_counter() - began) / times


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def merge_timings(given: Sequence[Sequence[Timing]]) -> list[Timing]:
    """Merge the timings of all ranks into one list.

    Args:
        given: Timings of each rank.

    Returns:
        One timing per operation, size and scope: the median over the groups, correct if it was so on every rank.
    """
    found: dict[tuple[str, str, int], list[Timing]] = {}
    for timings in given:
        for timing in timings:
            found.setdefault((timing.scope, timing.operation, timing.bytes), []).append(timing)
    return [
        Timing(
            operation,
            scope,
            num_bytes,
            statistics.median(timing.sent_bytes for timing in timings),
            statistics.median(timing.seconds for timing in timings),
            all(timing.correct for timing in timings),
        )
        for (scope, operation, num_bytes), timings in found.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(scope: Scope) -> str:
    return {"within": "within the host", "across": "across hosts", "all": "among all ranks"}[scope.name]
