"""NVIDIA GPUs of this host, as Linux shows them: whether there are any, and which cores are near one."""

from pathlib import Path

DEV, PCI_DEVICES = Path("/dev"), Path("/sys/bus/pci/devices")


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
