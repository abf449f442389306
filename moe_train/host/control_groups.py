"""Control groups of this process, which may grant it less than the host has."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_MEMORY_EVENTS = {1: "memory.oom_control", 2: "memory.events"}  # by version of control groups


@dataclass(frozen=True)
class ControlGroup:
    """One control group.

    Attributes:
        folder: Folder of the group's files.
        version: Version of control groups, 1 or 2; the file names differ.
    """

    folder: Path
    version: int

    def read(self, name: str) -> str:
        """Return the text of one of the group's files; "" if the file does not exist."""
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return ""


def control_groups(controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[ControlGroup]:
    """Yield the control groups of this process and their ancestors, innermost first. The limit of each one applies.

    Args:
        controller: Resource that the groups control: "cpu" or "memory".
        root: Folder where the control groups are mounted.
        membership: File that names the groups of this process.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controller if controllers else root
        group = mount / path.lstrip("/")  # in a container it may be missing, but its ancestor, the mount, exists
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            yield ControlGroup(folder, 1 if controllers else 2)


def count_memory_kills(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Return how many processes of this process's control group the kernel has killed for lack of memory.

    The host's own count, in /proc/vmstat, would blame the kernel for kills in other jobs and containers.

    Args:
        root: Folder where the control groups are mounted.
        membership: File that names the groups of this process.

    Returns:
        The number since the group was made; None if the kernel does not tell.
    """
    for group in control_groups("memory", root, membership):
        for line in group.read(_MEMORY_EVENTS[group.version]).splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdecimal():
                return int(value)
    return None
