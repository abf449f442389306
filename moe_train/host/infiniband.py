"""InfiniBand and RoCE of this host: what NCCL lacks to use them. It then takes TCP, without a word."""

import ctypes.util
import resource
from collections.abc import Callable
from pathlib import Path

ADAPTERS, NODES = Path("/sys/class/infiniband"), Path("/dev/infiniband")
_LIBRARIES = ("ibverbs", "rdmacm")
_LEAST_LOCKED_BYTES = 2**30  # registered buffers of a rank; Docker's limit is 64 KiB


def infiniband_obstacles(
    adapters: Path = ADAPTERS,
    nodes: Path = NODES,
    find_library: Callable[[str], str | None] = ctypes.util.find_library,
    locked: int | None = None,
) -> list[str]:
    """List what keeps a process from the adapters; empty if it can use them, or the host has none.

    Args:
        adapters: Folder of the host's adapters.
        nodes: Folder of their device nodes.
        find_library: Returns the file of a library; None if there is none.
        locked: Bytes that this process may lock in memory, -1: any number; None: ask the system.
    """
    if not adapters.is_dir() or not any(adapters.iterdir()):
        return []
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if locked is None else locked
    found = [f"no lib{name}.so" for name in _LIBRARIES if find_library(name) is None]
    if not any(nodes.glob("uverbs*")):
        found.append(f"no {nodes}/uverbs*")
    if limit not in (-1, resource.RLIM_INFINITY) and limit < _LEAST_LOCKED_BYTES:
        found.append(f"only {limit} bytes may be locked in memory (ulimit -l)")
    return found
