"""Processes of this host, as Linux's /proc tells: their ends, their parents and children. Standard library only."""

import contextlib
import os
import select
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Status:
    """Status of a process, as /proc tells it."""

    state: str
    parent: int
    num_threads: int
    started: int
    exit_status: int

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended and waits for its parent to ask; with threads left it may still write."""
        return self.state in "ZX" and self.num_threads <= 1


def status(pid: int) -> Status | None:
    """Read the status of a process; None if there is no such process, or it is hidden (see `exists`)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return Status(words[0], *(int(words[field - 3]) for field in (4, 20, 22, 52)))  # as proc(5) numbers the fields


def exists(pid: int) -> bool:
    """Return whether there is a process, also where /proc hides those of other users (its option hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def arguments_of(pid: int) -> list[str]:
    """Return the words of a process's command line; [] if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def environment_of(pid: int) -> list[bytes]:
    """Return the words NAME=VALUE with which a process was started; [] if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def processes_with(variable: str) -> list[int]:
    """Find the processes that were started with a word NAME=VALUE in their environment."""
    wanted = variable.encode()
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and wanted in environment_of(int(name))]


def descendants(pid: int) -> list[int]:
    """Find the children of a process, their children and so on."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := status(int(name))) is not None:
            children.setdefault(found.parent, []).append(int(name))
    result = [pid]
    for each in result:
        result += children.get(each, [])
    return result[1:]


def end_processes(pids: Iterable[int]) -> None:
    """End processes by SIGKILL; those that have ended are passed over."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Watched:
    """Process whose end is noticed. A process that nobody has waited for yet has ended too.

    Attributes:
        pid: Process id.
        started: Time of its start, because process ids are used again; None: /proc hides the process.
        descriptor: Descriptor that becomes readable at its end; None: the kernel has none.
    """

    pid: int
    started: int | None
    descriptor: int | None = None

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Begin to watch a process; None if there is no such process."""
        found = status(pid)
        if found is None and not exists(pid):
            return None
        descriptor = None
        with contextlib.suppress(OSError, AttributeError):  # an old kernel: the end is noticed a second later
            descriptor = os.pidfd_open(pid)
        return cls(pid, found.started if found is not None else None, descriptor)

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        if (found := status(self.pid)) is not None:
            return found.is_dead or self.started not in (None, found.started)
        if self.descriptor is not None and select.select([self.descriptor], [], [], 0)[0]:
            return True
        return not exists(self.pid)
