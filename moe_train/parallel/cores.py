"""CPU cores that this process may use: its affinity and the quotas of its control groups."""

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores(root: Path = CGROUP_ROOT, membership: Path = CGROUP_MEMBERSHIP) -> int:
    """Cores of the affinity mask, or fewer where a control group grants less CPU time, rounded down; at least 1.

    Args:
        root: where the control groups are mounted.
        membership: the file that names the groups of this process.
    """
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *cpu_quotas(root, membership)])))


def cpu_quotas(root: Path, membership: Path) -> list[float]:
    """Quotas, in cores, of the control groups of this process and their ancestors (versions 2 and 1)."""
    quotas = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root if not controllers else root / "cpu"
        group = mount / path.lstrip("/")  # in a container it may not be there, but its ancestor, the mount, is
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            if controllers:
                quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(folder / "cpu.max").partition(" ")
            if quota.isdecimal() and period.isdecimal() and int(period):  # not "max" and not -1
                quotas.append(int(quota) / int(period))
    return quotas


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
