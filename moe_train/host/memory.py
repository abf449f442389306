"""Host memory for training on CPU: how much this process may use, and how the C library keeps freed blocks."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_train.host.control_groups import MEMBERSHIP, ROOT, control_groups

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
_TOP_PAD_BYTES = 256 * 2**20
_LIMITS = {  # by version of control groups: the file of the limit, and the file of the usage
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks of any size, and not give them back to the system.

    A training step allocates the same large temporaries again and again. If they were given back, each of their pages
    would fault again. Measured on 2 cores with the quickstart's model: a step takes 0.8 to 0.9 of the time.

    Returns:
        Whether the C library accepted the setting; False if it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """Leave all objects that exist now out of Python's garbage collection, which otherwise looks at them in many steps.

    A model and its libraries are millions of objects: one look at them takes as long as hundreds of kernel launches.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def host_memory(
    meminfo: Path = Path("/proc/meminfo"), root: Path = ROOT, membership: Path = MEMBERSHIP
) -> tuple[int, int]:
    """Return the total and the available memory in bytes, at most what this process's control groups grant.

    Args:
        meminfo: File with the host's own numbers.
        root: Folder where the control groups are mounted.
        membership: File that names the groups of this process.
    """
    values = {}
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    total, available = values["MemTotal"], values["MemAvailable"]
    for group in control_groups("memory", root, membership):
        granted, taken = (group.read(name) for name in _LIMITS[group.version])
        if granted.isdecimal() and taken.isdecimal():  # not "max"
            total, available = min(total, int(granted)), min(available, max(0, int(granted) - int(taken)))
    return total, available
