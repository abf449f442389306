"""Processes of this host, as Linux's /proc tells: their ends, their parents and children. Standard library only."""

import contextlib
import os
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
    started: int
    exit_status: int


def status(pid: int) -> Status | None:
    """Read the status of a process; None if there is no such process."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return Status(words[0], int(words[1]), int(words[19]), int(words[49]))  # fields 3, 4, 22 and 52 of proc(5)


def command_line(pid: int) -> str:
    """Return the command line of a process; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


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


def process_mark(pid: int) -> str:
    """Build a mark that no other process has: process id, time of its start, name space of processes, and boot."""
    found = status(pid)
    space, boot = os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{pid} {found.started if found is not None else 0} {space} {boot}"


def is_of_this_host(mark: str) -> bool:
    """Return whether a mark is of a process that this process can see."""
    return mark.split()[2:] == process_mark(os.getpid()).split()[2:]


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
    """Process whose end is noticed. A process that nobody has waited for yet has ended too."""

    pid: int
    started: int
    descriptor: int | None = None

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Begin to watch a process; None if there is no such process."""
        found = status(pid)
        if found is None:
            return None
        descriptor = None
        with contextlib.suppress(OSError, AttributeError):  # an old kernel: the end is noticed a second later
            descriptor = os.pidfd_open(pid)
        return cls(pid, found.started, descriptor)

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        found = status(self.pid)
        return found is None or found.started != self.started or found.state in "ZX"
