"""The control groups of this process, which may grant it less than the host has."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class ControlGroup:
    """One group.

    Attributes:
        folder: Of its files.
        version: Of control groups, 1 or 2: their files have other names.
    """

    folder: Path
    version: int

    def read(self, name: str) -> str:
        """The text of one of its files; "" where it is not there."""
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return ""


def control_groups(controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[ControlGroup]:
    """The groups of this process and their ancestors, the innermost first: what one of them grants binds.

    Args:
        controller: What they control: "cpu", "memory".
        root: Where the control groups are mounted.
        membership: The file that names the groups of this process.
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
        group = mount / path.lstrip("/")  # in a container it may not be there, but its ancestor, the mount, is
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            yield ControlGroup(folder, 1 if controllers else 2)
