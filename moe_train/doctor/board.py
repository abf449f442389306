"""What ranks tell each other apart from collectives: a store in rank 0's process or its agent's; each wait has its end.

So the doctor knows which rank did not answer when a collective operation hangs, and can compare ranks that could not
even form a process group. Only rank 0 reads what all ranks have written, and tells the others what follows from it.
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

_PAUSE_SECONDS = 0.02  # between two looks of rank 0
_FAILURES = "failures"


class Unanswered(Exception):
    """Ranks that did not write what was waited for.

    Attributes:
        step: What was waited for.
        ranks: Those that did not answer; empty where another rank has reported a failure.
    """

    def __init__(self, step: str, ranks: Sequence[int]) -> None:
        super().__init__(f"{step}: no answer of ranks {list(ranks)}")
        self.step, self.ranks = step, tuple(ranks)


class Board:
    """Values that ranks write for each other, as JSON. Of one thread: a request may block while it is under way.

    Args:
        store: Of torch.distributed.
        rank: Of this process.
        world_size: All ranks.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self.rank, self.world_size = dist.PrefixStore("doctor", store), rank, world_size

    def meet(self, step: str, value: Any, judge: Callable[[list[Any]], Any], seconds: float) -> Any:
        """Every rank gives a value; rank 0 makes of them what all ranks get.

        Args:
            step: Name, used once.
            value: Of this rank.
            judge: Called in rank 0 with the values in order of rank.
            seconds: To wait for the slowest rank.

        Raises:
            Unanswered: In rank 0, if a rank did not write in time or has failed; elsewhere, if rank 0 did not.
            ConnectionError: If rank 0 is gone.

        Collective: All ranks.
        """
        self._set(f"{step}/{self.rank}", value)
        if self.rank == 0:
            verdict = judge(self._read_all(step, seconds))
            self._set(f"{step}/verdict", verdict)
            return verdict
        # Rank 0 may have waited for another rank, and then have judged.
        return self._wait(f"{step}/verdict", step, 2 * seconds)

    def mark(self, place: Sequence[int], text: str) -> None:
        """Note where this rank is.

        Args:
            place: Grows from mark to mark, and is the same on all ranks at the same point.
            text: In words.
        """
        self._set(f"mark/{self.rank}", [list(place), text])

    def marks(self) -> dict[int, tuple[list[int], str]]:
        """The last mark of each rank that made one."""
        keys = {rank: f"mark/{rank}" for rank in range(self.world_size)}
        written = [rank for rank, key in keys.items() if self._store.check([key])]
        values = self._store.multi_get([keys[rank] for rank in written]) if written else []
        found = {rank: json.loads(value) for rank, value in zip(written, values, strict=True)}
        return {rank: (place, text) for rank, (place, text) in found.items()}

    def report_failure(self, message: str) -> None:
        """Tell rank 0 that this rank cannot go on."""
        self._set(f"failed/{self.rank}", message)
        self._store.add(_FAILURES, 1)

    def failures(self, seconds: float) -> dict[int, str]:
        """What ranks have reported; returns when all have, or after the seconds."""
        deadline, found = time.monotonic() + seconds, dict[int, str]()
        while True:
            for rank in range(self.world_size):
                if rank not in found and self._store.check([f"failed/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"failed/{rank}"))
            if len(found) == self.world_size or time.monotonic() >= deadline:
                return found
            time.sleep(5 * _PAUSE_SECONDS)

    def say_over(self) -> None:
        """Rank 0 has shown what was found: the others may end."""
        self._set("over", True)

    def wait_until_over(self, seconds: float) -> None:
        """Until rank 0 has shown what was found, or is gone, or the seconds are over."""
        with contextlib.suppress(Unanswered, ConnectionError):
            self._wait("over", "over", seconds)

    def leave(self, seconds: float) -> None:
        """Rank 0, whose process holds the store, waits for the others."""
        with contextlib.suppress(Unanswered, ConnectionError):
            self._set(f"left/{self.rank}", True)
            if self.rank == 0:
                self._read_all("left", seconds)

    def _set(self, key: str, value: Any) -> None:
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:  # torch's errors, of the network or not, are RuntimeErrors
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
            # Asking for one costs a moment, for a thousand in vain a long one: the list shrinks from its front.
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
    """Two connections to the store of this start: one for the work, one for a thread that looks for a hang.

    Args:
        world: The place of this process.
        seconds: To wait for rank 0.

    Raises:
        ConnectionError: If rank 0 cannot be reached.
        UsageError: If its port is taken; on all ranks.

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
        store: One of `open_stores`.
        world: The place of this process.
        device: Of this rank.
        seconds: After which a collective operation that does not complete is an error.

    Collective: All ranks.
    """
    join_group(dist.PrefixStore("group", store), world, device, timedelta(seconds=seconds))
