"""Devices with the numbers of their data sheets, for `moe-train plan --device NAME`.

Peaks are of dense matrix products without sparsity. Memory is in GB of 1e9 bytes, as sold. Link rates are one way.
Every node has 8 devices and one 400 Gbit/s network port per device; no data sheet specifies the port. Hosts are those
of NVIDIA's DGX systems: 2 TB of memory in 16 channels, and 16 lanes of PCI Express per device. A node of MI300X is
taken to have the host of an H100. Sources: NVIDIA H100 SXM5, H200 SXM and A100 80GB SXM, DGX H100, DGX H200 and
DGX A100 640GB data sheets; AMD Instinct MI300X data sheet.
"""

from pathlib import Path

from moe_train.config.errors import UsageError
from moe_train.config.machine import Arithmetic, Host, Link, Machine, Network, read_machine

NODE_DEVICES = 8
PORT_GBPS = 400.0
_USED_OF_A_LINK = 0.8  # share of the data sheet's rate that long messages reach
_INTRA_LATENCY, _INTER_LATENCY = 20e-6, 40e-6  # seconds per collective operation
_OPERATION_SECONDS = 5e-6  # a kernel launch, with PyTorch's work on the host
_GB, _GBPS = 1e9, 1e9 / 8


def _network(bytes_per_second: float, latency_seconds: float) -> Network:
    link = Link(latency_seconds=latency_seconds, bytes_per_second=_USED_OF_A_LINK * bytes_per_second)
    return Network(all_to_all=link, all_reduce=link, all_gather=link)


def _host(channel_rate: float, link: float) -> Host:
    channels = 16
    return Host(
        memory_bytes=int(2000 * _GB),
        memory_bytes_per_second=_USED_OF_A_LINK * channels * channel_rate / NODE_DEVICES,
        link_bytes_per_second=_USED_OF_A_LINK * link,
    )


_DDR5 = _host(38.4e9, 63e9)  # DDR5-4800 and PCI Express 5.0
_DDR4 = _host(25.6e9, 31.5e9)  # DDR4-3200 and PCI Express 4.0


def _device(
    name: str, memory_gb: float, peaks: dict[Arithmetic, float], memory_rate: float, link: float, host: Host = _DDR5
) -> Machine:
    return Machine(
        name=name,
        memory_bytes=int(memory_gb * _GB),
        flops_per_second=peaks,
        memory_bytes_per_second=_USED_OF_A_LINK * memory_rate,
        operation_seconds=_OPERATION_SECONDS,
        ranks_per_node=NODE_DEVICES,
        host=host,
        intra_node=_network(link, _INTRA_LATENCY),
        inter_node=_network(PORT_GBPS * _GBPS, _INTER_LATENCY),
    )


# Peaks of bf16, fp16, and fp32 on the vector units: PyTorch uses TF32 only if it is enabled.
DEVICES = {
    "h100": _device("NVIDIA H100 SXM 80GB", 80, {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}, 3.35e12, 450e9),
    "h200": _device("NVIDIA H200 SXM 141GB", 141, {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}, 4.8e12, 450e9),
    "a100": _device(
        "NVIDIA A100 SXM 80GB", 80, {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}, 2.039e12, 300e9, _DDR4
    ),
    "mi300x": _device("AMD Instinct MI300X", 192, {"bf16": 1307e12, "fp16": 1307e12, "fp32": 163e12}, 5.3e12, 448e9),
}


def find_device(name: str, inter_node_gbps: float | None = None) -> Machine:
    """Find a device by its name, or read it from a file.

    Args:
        name: Name in DEVICES, or path of a file with the output of `moe-train doctor --json`.
        inter_node_gbps: Gigabits per second of each device's port between nodes; it replaces the known rate. None keeps
            that rate.

    Raises:
        UsageError: If there is no such device and no such file.
    """
    if name in DEVICES:
        machine = DEVICES[name]
    elif Path(name).is_file():
        machine = read_machine(Path(name))
    else:
        raise UsageError(
            f"--device ({name!r}) must be one of {', '.join(DEVICES)}, or a file of moe-train doctor --json"
        )
    if inter_node_gbps is None:
        return machine
    port = _network(inter_node_gbps * _GBPS / _USED_OF_A_LINK, _INTER_LATENCY)
    if machine.inter_node is not None:
        links = {kind: getattr(machine.inter_node, kind) for kind in ("all_to_all", "all_reduce", "all_gather")}
        rate = inter_node_gbps * _GBPS
        port = Network(
            **{kind: Link(latency_seconds=link.latency_seconds, bytes_per_second=rate) for kind, link in links.items()}
        )
    return machine.model_copy(update={"inter_node": port})
