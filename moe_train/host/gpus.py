"""NVIDIA GPUs of this host: whether there are any, why torch cannot use them, their memory, and the cores near one."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.config.errors import UsageError

if TYPE_CHECKING:
    import torch

DEV, PCI_DEVICES = Path("/dev"), Path("/sys/bus/pci/devices")
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def gpu_nodes(dev: Path = DEV) -> list[Path]:
    """List the device nodes of GPUs, which exist whether or not torch can use them.

    Args:
        dev: Folder of device nodes.
    """
    return sorted(node for node in dev.glob("nvidia*") if node.name.removeprefix("nvidia").isdecimal())


def near_cores(domain: int, bus: int, device: int, pci_devices: Path = PCI_DEVICES) -> set[int]:
    """Read the cores of the NUMA node that a GPU is attached to; empty if the system does not tell.

    Args:
        domain: PCI domain of the GPU.
        bus: PCI bus of the GPU.
        device: PCI device of the GPU.
        pci_devices: Folder of PCI devices.
    """
    try:
        text = (pci_devices / f"{domain:04x}:{bus:02x}:{device:02x}.0" / "local_cpulist").read_text().strip()
    except OSError:
        return set()
    cores: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def refuse_unusable_gpu(dev: Path = DEV) -> None:
    """Refuse a host whose GPUs torch cannot use: with an old driver it would train on the CPU without a word.

    Call it only where torch finds no device.

    Args:
        dev: Folder of device nodes.

    Raises:
        UsageError: If the host has a GPU; with torch's reason.
    """
    import torch

    nodes, reason = gpu_nodes(dev), "torch finds no device"
    if not nodes:
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a CPU build raises AssertionError
        reason = " ".join(str(error).split())
    raise UsageError(
        f"parallel.device is auto and this host has a GPU ({nodes[0]}), but torch {torch.__version__} cannot use it: "
        f"{reason}; install the build of torch for this driver (make setup chooses it), or give --parallel.device=cpu "
        "to train on the CPU"
    )


def bind_near_gpu(device: torch.device, pci_devices: Path = PCI_DEVICES) -> set[int]:
    """Bind this process to the cores near its GPU; those of another socket reach its memory more slowly.

    It changes nothing on the CPU, nor where the process may not use all cores of the host: then a launcher, a
    control group or the user has chosen cores already. Call it after `set_threads`, which counts the host's cores.

    Args:
        device: Device of this rank.
        pci_devices: Folder of PCI devices.

    Returns:
        The cores; empty if nothing was changed.
    """
    import torch

    allowed = os.sched_getaffinity(0)
    if device.type != "cuda" or len(allowed) < (os.cpu_count() or 1):
        return set()
    found = torch.cuda.get_device_properties(device)
    domain, bus, number = (getattr(found, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    if domain is None or bus is None or number is None:  # not in every torch
        return set()
    cores = near_cores(domain, bus, number, pci_devices) & allowed
    if not cores or cores == allowed:
        return set()
    os.sched_setaffinity(0, cores)
    return cores


def prefer_growing_segments(environ: MutableMapping[str, str]) -> None:
    """Let torch's memory of the GPU grow in place, unless the user has set up the allocator. Before CUDA starts.

    The sizes of routed rows differ from step to step, and would cut the memory to pieces.

    Args:
        environ: Environment variables.
    """
    if not any(name in environ for name in _ALLOCATOR_SETTINGS):
        environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def num_devices(device_type: str) -> int | None:
    """Count the CUDA devices that this process sees; None for the CPU, which can run any number of ranks."""
    import torch

    return torch.cuda.device_count() if device_type == "cuda" else None
