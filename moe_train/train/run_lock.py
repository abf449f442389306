"""Lock of a run's folder: one run writes into it, also over NFS, and what a dead run held is taken over.

The lock is a file lock/NNNNNNNN with its owner's identity. The highest number counts, and numbers never go back, so
that a start that was slow cannot take over a lock that it judged long ago. A start creates the next number (O_EXCL, of
which one start succeeds), looks whether its number is the highest, and only then removes the lower ones. An owner whose
file is gone has lost the lock. A lock that was given back keeps its number under the name NNNNNNNN.released.

The owner touches its file every few seconds. Its age is the file server's time on both sides: that of the touch, and
that of a file which the judging process makes there. Every look opens the file, because NFS clients ask the server
again only then; it compares the text, because numbers begin again in a folder that was removed.
"""

import contextlib
import errno
import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.errors import EXIT_LOST, UsageError
from moe_train.distributed.collectives import Group, gather_objects
from moe_train.distributed.consensus import run_on_all_ranks
from moe_train.host.process_identity import ProcessIdentity

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a touch; NFS servers need up to half a minute to come back
_RELEASED = ".released"
_RETRY_SECONDS, _POLL_SECONDS = 0.02, 1.0
_MOST_BYTES = 4096  # of an owner's identity
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)


class LockLost(RuntimeError):
    """Error for a run whose folder another run has taken over, because this one gave no sign of life."""

    exit_code = EXIT_LOST


@dataclass(frozen=True)
class HeldLock:
    """Lock that a run holds.

    Attributes:
        path: File of the lock.
        text: Text of the file, which no other lock has: the identity of the owner, and a mark.
    """

    path: Path
    text: str

    def is_there(self, touch: bool = False) -> bool:
        """Return whether the file is still that of this lock.

        Args:
            touch: Whether to give a sign of life.

        Raises:
            OSError: If the server does not answer.
        """
        try:
            with self.path.open("rb") as file:
                is_own = file.read(_MOST_BYTES).decode(errors="replace") == self.text
                if is_own and touch:
                    os.utime(file.fileno())  # without a time: the server sets its own
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        return is_own


@dataclass(frozen=True)
class Holder:
    """Living owner of a lock.

    Attributes:
        identity: Identity of its process; None: it cannot be read.
        seconds: Time since its last sign of life, by the file server's clock.
    """

    identity: ProcessIdentity | None
    seconds: float

    def describe(self) -> str:
        """Describe the owner: host, pid, job, and the age of its last sign of life."""
        who = self.identity.describe() if self.identity is not None else "an unknown process"
        return f"{who}; its last sign of life is {max(0.0, self.seconds):.0f} s old"


class RunLock:
    """Lock of a run's folder. Rank 0 acquires it; the other ranks join what rank 0 holds."""

    def __init__(self, run_dir: Path, beat_seconds: float = BEAT_SECONDS, stale_seconds: float = STALE_SECONDS) -> None:
        """Prepare a lock that is not held yet.

        Args:
            run_dir: Folder of the run; it exists.
            beat_seconds: Time between two signs of life.
            stale_seconds: Time without a sign of life after which another start takes the lock over.
        """
        self.run_dir, self._folder = run_dir, run_dir / "lock"
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._held: HeldLock | None = None
        self._is_owner = self._is_lost = False
        self._is_writing = threading.RLock()
        self._released = threading.Event()

    @property
    def held(self) -> HeldLock | None:
        """The held lock, for `join` on other ranks; None: it is not held."""
        return self._held

    @property
    def path(self) -> Path | None:
        """File of the held lock; None: it is not held."""
        return self._held.path if self._held is not None else None

    def try_acquire(self) -> Holder | None:
        """Acquire the lock if no living run holds it.

        Returns:
            The owner that holds it; None: it was acquired, and signs of life are given from now on.

        Raises:
            OSError: If the folder cannot be written.
        """
        self._folder.mkdir(exist_ok=True)
        here, least = ProcessIdentity.own(), 0
        text = json.dumps(here.as_dict() | {"mark": uuid.uuid4().hex}) + "\n"
        while True:
            highest = max([least, *self._numbers()])
            if highest and not self._is_released(highest):
                holder = self._holder(highest)
                if holder is None:  # given back or taken over right now
                    time.sleep(_RETRY_SECONDS)
                    continue
                has_ended = holder.identity is not None and holder.identity.has_ended(here)
                if not has_ended and holder.seconds < self._stale_seconds:
                    return holder
            number = highest + 1
            if not _create(self._folder / _name(number), text):
                least = number  # another start was faster; a cached listing may not show it yet
            elif max(self._numbers()) > number or self._is_released(number):
                (self._folder / _name(number)).unlink(missing_ok=True)  # judged by what is long past
            else:
                break
        for lower in sorted(self._numbers() - {number}):  # its owner loses it before this run writes
            for name in (_name(lower), _name(lower) + _RELEASED):
                (self._folder / name).unlink(missing_ok=True)
        self._held, self._is_owner = HeldLock(self._folder / _name(number), text), True
        threading.Thread(target=self._give_signs_of_life, args=(self._held,), name="run lock", daemon=True).start()
        return None

    def join(self, held: HeldLock) -> None:
        """Take part in the lock that rank 0 holds, without signs of life.

        Args:
            held: `held` of rank 0.
        """
        self._held = held

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock while the block writes into the run's folder; the block must be short.

        Raises:
            LockLost: If another run has taken the folder over, or this one has given it back.
        """
        with self._is_writing:
            self.check()
            yield

    def check(self) -> None:
        """Ask the file server whether this run still holds its folder.

        Raises:
            LockLost: If it does not.
            OSError: If the server does not answer.
        """
        if self._held is None or self._released.is_set():
            raise LockLost(f"{self.run_dir} is not held by this run (any more): nothing is written into it")
        if not self._is_lost and not self._held.is_there():
            self._is_lost = not self._begin_again(self._held)
        self.check_known()

    def _begin_again(self, held: HeldLock) -> bool:
        """Lock the folder once more if it was moved or removed, as a whole: then no other run has taken it over."""
        with self._is_writing:
            if held.is_there():  # another thread was faster
                return True
            if self._folder.exists():
                return False
            if not self._is_owner:  # rank 0 does it
                return True
            self._folder.mkdir(parents=True, exist_ok=True)
            return _create(held.path, held.text) and self._numbers() == {int(held.path.name)}

    def check_known(self) -> None:
        """Raise if the loss of the lock is known already; nothing is asked.

        Raises:
            LockLost: If another run has taken the folder over.
        """
        if self._is_lost:
            raise LockLost(self._describe_loss())

    def release(self) -> None:
        """Give the lock back, if this process acquired it. A write under way ends first; later ones are refused."""
        with self._is_writing:
            is_held, self._is_owner = self._is_owner, False
            self._released.set()
            if is_held and self._held is not None:
                path = self._held.path
                with contextlib.suppress(OSError):  # the server is gone: then it grows stale
                    if self._held.is_there():
                        path.rename(path.with_name(path.name + _RELEASED))

    def _give_signs_of_life(self, held: HeldLock) -> None:
        while not self._released.wait(self._beat_seconds):
            with contextlib.suppress(OSError, LockLost):  # `check_known` tells of a loss
                if not held.is_there(touch=True) and not self._released.is_set():
                    self.check()

    def _numbers(self) -> set[int]:
        found = (name.removesuffix(_RELEASED) for name in os.listdir(self._folder))
        return {int(name) for name in found if name.isdecimal()}

    def _is_released(self, number: int) -> bool:
        return (self._folder / (_name(number) + _RELEASED)).exists()

    def _holder(self, number: int) -> Holder | None:
        """Read the owner of a lock, and how long it has been silent; None: the file is gone."""
        try:
            with (self._folder / _name(number)).open("rb") as file:
                touched, text = os.fstat(file.fileno()).st_mtime, file.read(_MOST_BYTES)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
        with tempfile.TemporaryFile(dir=self._folder) as probe:
            os.utime(probe.fileno())
            now = os.fstat(probe.fileno()).st_mtime
        return Holder(ProcessIdentity.parse(text), now - touched)  # None: killed before the text was written

    def _describe_loss(self) -> str:
        number, holder = 0, None
        with contextlib.suppress(OSError):
            number = max(self._numbers(), default=0)
            holder = self._holder(number)
        who = f" ({holder.describe()})" if holder is not None else ""
        if self.path is not None and number == int(self.path.name):  # it began with number 1 again
            return f"{self._folder} was removed, and another run holds the folder{who}: this run writes nothing more"
        return (
            f"{self.run_dir} was taken over{who} while this run gave no sign of life, as one that was suspended for "
            f"more than {self._stale_seconds:g} s: it writes nothing more"
        )


def acquire_together(
    lock: RunLock, rank: int, wait_seconds: float, say: Callable[[str], object], group: Group | None = None
) -> str:
    """Acquire the lock on rank 0 and join it on the others; wait while a living run holds it.

    Args:
        lock: Lock of the run's folder, on this rank.
        rank: Rank of this process.
        wait_seconds: Longest time to wait, by rank 0's clock.
        say: Called on rank 0 with a message if the start has to wait.
        group: All ranks; None: the default group.

    Returns:
        Description of the run that this start has waited for, the same on all ranks; empty: it had not to wait.

    Raises:
        UsageError: On every rank, if a living run holds the folder and does not give it back in time.

    Collective: All ranks.
    """
    began, waited_for = time.monotonic(), ""

    def try_once() -> tuple[HeldLock | None, str]:
        if rank != 0:
            return None, ""
        try:
            holder = lock.try_acquire()
        except OSError as error:
            raise UsageError(f"train.run_dir ({str(lock.run_dir)!r}) cannot be locked: {error}") from error
        if holder is None:
            return lock.held, ""
        if (waited := time.monotonic() - began) >= wait_seconds:
            raise UsageError(
                f"train.run_dir ({str(lock.run_dir)!r}) is in use by another run ({holder.describe()}), still after "
                f"{waited:.0f} s (train.lock_wait_seconds): stop that run, or choose another train.run_dir"
            )
        return None, holder.describe()

    while True:
        found = run_on_all_ranks(try_once, group=group)
        held, holder = gather_objects(found, group)[0]
        if held is not None:
            lock.join(held)
            return waited_for
        if rank == 0 and not waited_for:
            say(f"waiting up to {wait_seconds:g} s: {lock.run_dir} is in use by another run ({holder})")
        waited_for = holder
        time.sleep(min(_POLL_SECONDS, max(0.0, wait_seconds - (time.monotonic() - began))))


def _name(number: int) -> str:
    return f"{number:08d}"


def _create(path: Path, text: str) -> bool:
    """Create the file of a lock; return False if it exists already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.utime(path)  # the writing client may have set its own time
    except OSError:  # the disk is full
        path.unlink(missing_ok=True)
        raise
    return True
