"""Board on which ranks exchange values outside of collectives, with a timeout for every wait.

The values lie in a store that rank 0's process or its torchrun agent holds. So the doctor knows which rank did not
answer when a collective hangs, and can compare ranks that could not form a process group. Only rank 0 reads the values
of all ranks; it sends its verdict to the others.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_train.distributed.bootstrap import environment
from moe_train.distributed.rendezvous import join_group, open_store
from moe_train.distributed.world import World

_PAUSE_SECONDS = 0.02  # between two polls of the store by rank 0
_FAILURES = "failures"


class Unanswered(Exception):
    """Error that names the ranks that did not write an expected value in time.

    Attributes:
        step: Name of the expected value.
        ranks: Ranks that did not answer; empty if another rank has reported a failure.
    """

    def __init__(self, step: str, ranks: Sequence[int]) -> None:
        super().__init__(f"{step}: no answer of ranks {list(ranks)}")
        self.step, self.ranks = step, tuple(ranks)


class Board:
    """Values that ranks write for each other, as JSON.

    Use one board from one thread only: a request may block that thread.

    Args:
        store: Store of torch.distributed.
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self.rank, self.world_size = dist.PrefixStore("doctor", store), rank, world_size

    def meet(self, step: str, value: Any, judge: Callable[[list[Any]], Any], seconds: float) -> Any:
        """Give this rank's value to rank 0, and return the verdict that rank 0 makes of all values.

        Args:
            step: Name of the exchange, used once.
            value: Value of this rank, representable in JSON.
            judge: Called on rank 0 with the list of all values in rank order; returns the verdict.
            seconds: Time to wait for the slowest rank.

        Returns:
            The verdict, the same on all ranks.

        Raises:
            Unanswered: On rank 0, if a rank did not write in time or has failed; on the other ranks, if rank 0 did
                not write its verdict in time.
            ConnectionError: If rank 0 is gone.

        Collective: All ranks.
        """
        self._set(f"{step}/{self.rank}", value)
        if self.rank == 0:
            verdict = judge(self._read_all(step, seconds))
            self._set(f"{step}/verdict", verdict)
            return verdict
        # Twice the time: rank 0 may wait for another rank first, and then judge.
        return self._wait(f"{step}/verdict", step, 2 * seconds)

    def mark(self, place: Sequence[int], text: str) -> None:
        """Note where this rank is.

        Args:
            place: Position of the mark. It grows from mark to mark, and is the same on all ranks at the same point.
            text: Description of what the rank does there.
        """
        self._set(f"mark/{self.rank}", [list(place), text])

    def marks(self) -> dict[int, tuple[list[int], str]]:
        """Return place and text of the last mark, by rank; ranks without a mark are left out."""
        keys = {rank: f"mark/{rank}" for rank in range(self.world_size)}
        written = [rank for rank, key in keys.items() if self._store.check([key])]
        values = self._store.multi_get([keys[rank] for rank in written]) if written else []
        found = {rank: json.loads(value) for rank, value in zip(written, values, strict=True)}
        return {rank: (place, text) for rank, (place, text) in found.items()}

    def report_failure(self, message: str) -> None:
        """Tell rank 0 that this rank cannot continue.

        Args:
            message: Reason of the failure.
        """
        self._set(f"failed/{self.rank}", message)
        self._store.add(_FAILURES, 1)

    def failures(self, seconds: float) -> dict[int, str]:
        """Return the failures that ranks have reported, once all have reported one or the time is over.

        Args:
            seconds: Longest wait.

        Returns:
            Messages by rank.
        """
        deadline, found = time.monotonic() + seconds, dict[int, str]()
        while True:
            for rank in range(self.world_size):
                if rank not in found and self._store.check([f"failed/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"failed/{rank}"))
            if len(found) == self.world_size or time.monotonic() >= deadline:
                return found
            time.sleep(5 * _PAUSE_SECONDS)

    def say_over(self) -> None:
        """Tell the other ranks that rank 0 has shown the report, so that they may end."""
        self._set("over", True)

    def wait_until_over(self, seconds: float) -> None:
        """Wait until rank 0 has shown the report, or is gone, or the seconds are over."""
        with contextlib.suppress(Unanswered, ConnectionError):
            self._wait("over", "over", seconds)

    def leave(self, seconds: float) -> None:
        """Leave the board. Rank 0, whose process holds the store, waits up to `seconds` for the others."""
        with contextlib.suppress(Unanswered, ConnectionError):
            self._set(f"left/{self.rank}", True)
            if self.rank == 0:
                self._read_all("left", seconds)

    def _set(self, key: str, value: Any) -> None:
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:  # torch raises RuntimeErrors, for the network and everything else
            raise ConnectionError(f"rank 0 is gone: {str(error).splitlines()[0]}") from error

    def _wait(self, key: str, step: str, seconds: float) -> Any:
        try:
            self._store.wait([key], timedelta(seconds=seconds))
            return json.loads(self._store.get(key))
        except dist.DistNetworkError as error:
            raise ConnectionError(f"rank 0 is gone: {str(error).splitlines()[0]}") from error
        except RuntimeError as error:  # DistStoreError: the time is over
            raise Unanswered(step, [0]) from error

    def _read_all(self, step: str, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        missing = list(range(self.world_size))
        while missing:
            # One check is quick, a thousand vain checks are slow: only the first missing rank is checked.
            while missing and self._store.check([f"{step}/{missing[0]}"]):
                missing.pop(0)
            if missing and (time.monotonic() >= deadline or self._store.add(_FAILURES, 0) > 0):
                has_failed = time.monotonic() < deadline
                silent = [rank for rank in missing if not self._store.check([f"{step}/{rank}"])]
                if silent:
                    raise Unanswered(step, [] if has_failed else silent)
            elif missing:
                time.sleep(_PAUSE_SECONDS)
        return [json.loads(value) for value in self._store.multi_get([f"{step}/{r}" for r in range(self.world_size)])]


def open_stores(world: World, seconds: float) -> tuple[Any, Any]:
    """Open two connections to the store of this launch: one for the work, one for the thread that looks for hangs.

    Args:
        world: Place of this process among the ranks.
        seconds: Time to wait for rank 0.

    Returns:
        Both stores; one and the same object if there is one rank.

    Raises:
        ConnectionError: If rank 0 cannot be reached.
        UsageError: If the port of rank 0 is taken; on all ranks.

    Collective: All ranks.
    """
    try:
        store = open_store(world, timedelta(seconds=seconds), environment())
        return store, store if world.world_size == 1 else store.clone()
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConnectionError(f"rank {world.rank} cannot meet the others: {reason}") from error


def join_ranks(store: Any, world: World, device: torch.device, seconds: float) -> None:
    """Join torch.distributed as training does.

    Args:
        store: One of the stores of `open_stores`.
        world: Place of this process among the ranks.
        device: Device of this rank.
        seconds: Timeout of a collective operation.

    Collective: All ranks.
    """
    join_group(dist.PrefixStore("group", store), world, device, timedelta(seconds=seconds))
