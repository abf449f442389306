"""CPU cores that this process may use, from its affinity mask and the quotas of its control groups."""

import math
import os
from pathlib import Path

from moe_train.host.control_groups import MEMBERSHIP, ROOT, control_groups


def usable_cores(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Count the cores of the affinity mask, or fewer if a control group grants less CPU time; rounded down, at least 1.

    Args:
        root: Folder where the control groups are mounted.
        membership: File that names the groups of this process.
    """
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *cpu_quotas(root, membership)])))


def cpu_quotas(root: Path, membership: Path) -> list[float]:
    """List the CPU quotas, in cores, of this process's control groups and their ancestors (versions 2 and 1).

    Args:
        root: Folder where the control groups are mounted.
        membership: File that names the groups of this process.
    """
    quotas = []
    for group in control_groups("cpu", root, membership):
        if group.version == 1:
            quota, period = group.read("cpu.cfs_quota_us"), group.read("cpu.cfs_period_us")
        else:
            quota, _, period = group.read("cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):  # not "max" and not -1
            quotas.append(int(quota) / int(period))
    return quotas
