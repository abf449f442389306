"""Monitor of all ranks: heartbeats beside their collectives show which rank is lost, and end ranks that wait in vain.

Every rank writes its own value each second. Rank 0 reads all values and writes one verdict. The other ranks read the
verdict; its number shows whether rank 0 lives. So each rank makes two requests per second, however many ranks there
are. There are two threads: one talks to the store, where it may block for ever; the other one judges by what was read
last.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from moe_train.distributed.store import KeyStore, open_store
from moe_train.liveness.hang_report import Reporter
from moe_train.liveness.heartbeats import FAILED, LEFT, Absence, Heartbeats, first_absence

_VERDICT = "verdict"
_MOST_TOLD = 16  # absent ranks in a verdict, the longest absent first
_STUCK_SECONDS = 4.0  # without progress in the flight recorder
_SAY_SECONDS = 3.0  # for the last word to reach the store, and for the other ranks to leave before the store ends
_MOST_CHARACTERS = 500  # length of a failure's message


class PeerMonitor:
    """Monitor that knows which rank is lost. Create it with `join_peers`.

    Args:
        store: Store of all ranks; None for one process: no rank is ever lost.
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout_seconds: Silence after which a rank is lost, and after which this rank ends if it is stuck.
        reporter: Writes where the process is, and ends it. Its flight recorder shows whether the process moves.
        beat_seconds: Time between two heartbeats.
        clock: Returns seconds that never go back.
    """

    def __init__(
        self,
        store: KeyStore | None,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        reporter: Reporter,
        beat_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._rank, self._timeout, self._reporter = store, rank, timeout_seconds, reporter
        self._beat_seconds, self._clock = beat_seconds, clock
        self._lock = threading.Lock()  # guards the next two lines
        self._heartbeats = Heartbeats(list(range(1, world_size)) if rank == 0 else [0], clock())
        self._told, self._told_at = list[Absence](), clock()
        self._last_word: str | None = None
        self._is_asking = False
        self._wake, self._is_said, self._stopped, self._closed = (threading.Event() for _ in range(4))

    def start(self) -> None:
        """Start to send and read heartbeats."""
        if self._store is not None:
            threading.Thread(target=self._talk, args=(self._store,), name="signs of life", daemon=True).start()
            threading.Thread(target=self._judge, name="peer monitor", daemon=True).start()

    def suspect(self) -> str | None:
        """Name a rank that is gone, has failed, or is silent for more than four seconds; None if none is known now."""
        first = self._first_absence()
        return first.describe() if first is not None and first.is_certain else None

    def culprit(self, wait_seconds: float = 10.0) -> str | None:
        """Name the rank to blame for a communication error, as soon as it is known.

        It does not return if a thread of this process is ending it: the error then comes from another rank's end.

        Args:
            wait_seconds: Time to wait until a silence is noticed.

        Returns:
            A clause such as "rank 2 has given no sign of life for 5 s"; None: all ranks live.
        """
        self._reporter.wait_for_end()
        self._is_asking = True
        try:
            deadline = self._clock() + wait_seconds
            while (found := self.suspect()) is None and self._clock() < deadline and self._store is not None:
                time.sleep(0.1)
            self._reporter.wait_for_end()
            return found
        finally:
            self._is_asking = False

    def leave(self) -> None:
        """Tell the others that this rank is done. Call it after the last collective; rank 0 waits for the others."""
        self._say(LEFT)
        deadline = self._clock() + _SAY_SECONDS
        while self._rank == 0 and self._clock() < deadline and not self._closed.is_set():
            with self._lock:
                if self._heartbeats.num_present() == 0:
                    break
            self._wake.set()  # read the values now, not at the next heartbeat
            time.sleep(0.05)
        self._closed.set()

    def fail(self, message: str) -> None:
        """Tell the others that this rank ends, and why. After a communication error, call `culprit` first.

        The process must end soon afterwards, because the monitor does not end it any more.

        Args:
            message: Reason of the failure, such as "ValueError: ...".
        """
        self._say(FAILED + message[:_MOST_CHARACTERS])
        if self._rank == 0:
            self._closed.wait(2.5 * self._beat_seconds)  # the store ends with this process; others read once per beat
        self._closed.set()

    def _say(self, word: str) -> None:
        if self._store is None:
            self._closed.set()
        elif self._last_word is None:
            self._stopped.set()
            self._last_word = word
            self._wake.set()
            self._is_said.wait(_SAY_SECONDS)

    def _talk(self, store: KeyStore) -> None:
        number = 0
        try:
            while not self._closed.is_set():
                number += 1
                self._wake.clear()  # before the word is read, so that no word is missed
                word = self._last_word
                if self._rank == 0:
                    self._hear_all(store)
                    self._publish(store, word or str(number))
                else:
                    store.set({_key(self._rank): word or str(number)})
                    if self._hear_verdict(store).startswith(FAILED):
                        break  # the store ends with rank 0
                if word is not None:
                    self._is_said.set()
                self._wake.wait(self._beat_seconds)
        except ConnectionError:  # the store is in rank 0's process
            with self._lock:
                if self._rank != 0:
                    self._heartbeats.lose(0, "is gone: its connection was closed")
        self._is_said.set()

    def _hear_all(self, store: KeyStore) -> None:
        with self._lock:
            ranks = self._heartbeats.ranks
        values = store.get([_key(rank) for rank in ranks])
        now = self._clock()
        with self._lock:
            self._heartbeats.look(now)
            self._heartbeats.hear(dict(zip(ranks, values)), now)

    def _publish(self, store: KeyStore, word: str) -> None:
        now = self._clock()
        with self._lock:
            absences = self._heartbeats.absences(now)
        absences.sort(key=lambda absence: -absence.seconds)
        told = [[absence.rank, absence.seconds, absence.reason] for absence in absences[:_MOST_TOLD]]
        store.set({_VERDICT: json.dumps([word, told])})

    def _hear_verdict(self, store: KeyStore) -> str:
        word, told = json.loads(store.get([_VERDICT])[0])
        now = self._clock()
        with self._lock:
            self._heartbeats.look(now)
            self._heartbeats.hear({0: word}, now)
            self._told, self._told_at = [Absence(*values) for values in told if values[0] != self._rank], now
        return word

    def _first_absence(self) -> Absence | None:
        now = self._clock()
        with self._lock:
            self._heartbeats.look(now)
            found = self._heartbeats.absences(now)
            # Rank 0 may have ended because of the absences in its last verdict.
            later = now - self._told_at
            found += [replace(told, seconds=told.seconds + later * told.is_certain) for told in self._told]
        return first_absence(found)

    def _judge(self) -> None:
        moves, moved = -1, self._clock()
        while not self._stopped.wait(self._beat_seconds / 2):
            now, current = self._clock(), self._reporter.flight_recorder.num_moves
            if current != moves or self._is_asking:
                moves, moved = current, now
            first = self._first_absence()
            if first is not None and first.seconds >= self._timeout and now - moved >= _STUCK_SECONDS:
                self._reporter.end(f"{first.describe()}; this rank waits for it in vain")
                return


def join_peers(
    address: str, rank: int, world_size: int, timeout_seconds: float, reporter: Reporter, beat_seconds: float = 1.0
) -> PeerMonitor:
    """Start to monitor all ranks.

    Args:
        address: Address of rank 0's host, as the other ranks reach it.
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout_seconds: Silence after which a rank is lost.
        reporter: Writes where the process is, and ends it.
        beat_seconds: Time between two heartbeats.

    Returns:
        The running monitor.

    Raises:
        RuntimeError: If a rank cannot reach rank 0; the same on every rank.

    Collective: All ranks.
    """
    first_values = {_key(other): "" for other in range(1, world_size)} | {_VERDICT: json.dumps(["", []])}
    store = open_store(address, first_values)
    monitor = PeerMonitor(store, rank, world_size, timeout_seconds, reporter, beat_seconds)
    monitor.start()
    return monitor


def _key(rank: int) -> str:
    return f"beat/{rank}"
