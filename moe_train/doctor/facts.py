"""What one rank knows of itself: versions, code, configuration, environment, device and host."""

import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import moe_train
from moe_train.distributed.addresses import route_interface
from moe_train.distributed.world import World
from moe_train.host.cores import usable_cores
from moe_train.host.memory import host_memory
from moe_train.host.versions import PACKAGES, software

# Variables that change what training does, or how fast. What each rank must have for itself is not among them.
_PREFIXES = (
    *("NCCL_", "RCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "KMP_", "GOMP_"),
    *("OPENBLAS_", "PYTORCH_", "CUBLAS_", "CUDNN_", "CUDA_", "HSA_", "DS_", "TRITON_", "TORCH_ALLOW_TF32"),
)
_NAMES = ("LD_PRELOAD", "PYTHONHASHSEED", "MALLOC_ARENA_MAX", "TORCH_LOGS")
# What a launcher or host has for itself, or a rank for its own cores and files, and what only one need have. The last:
# `import deepspeed` sets it, so that ranks next to a launcher that did so inherit it, and others do not.
_OWN = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_CACHE_PATH"),
    *("DS_ENV_FILE", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "TRITON_CACHE_DIR"),
    *("NCCL_HOSTID", "NCCL_DEBUG_FILE", "NCCL_TOPO_DUMP_FILE", "NCCL_GRAPH_DUMP_FILE"),
    *("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"),
    "PYTORCH_NVML_BASED_CUDA_CHECK",
)
_GIT_SECONDS = 5
_BUSY_SECONDS = 0.25


@dataclass(frozen=True)
class Facts:
    """Of one rank. Sizes are bytes; None and empty: not known here.

    Attributes:
        rank, local_rank, node: Its place; node counts the hosts as the launcher does.
        hostname: Of its host, as the host says.
        launcher: That started it.
        process: Its id on its host.
        versions: Of Python, packages, NCCL, CUDA and the driver, by name.
        digest: Of the contents of the package's files.
        commit: Of the package's git checkout.
        fields: Of the resolved configuration, by dotted name; empty without one.
        failure: Why the configuration or the device is not to be had here.
        options: Of the doctor, which all ranks must be given alike.
        environment: Variables that matter.
        device: Its kind ("cpu", "cuda"), name, memory, free memory and, on CUDA, UUID.
        memory, memory_available: Of the host, or what its control group grants.
        cores: That this process may use.
        host_cores: That the host has.
        threads: Of one rank on the CPU.
        shared_memory, shared_memory_free: Of /dev/shm.
        open_files: That this process may have.
        interface, interface_mbit: To the other hosts, and its speed as the system says, in megabits a second.
        busy_cores: Of the host, taken by other work; of a host's first rank only.
    """

    rank: int
    local_rank: int
    node: int
    hostname: str
    launcher: str
    process: int
    versions: dict[str, str]
    digest: str
    commit: str | None
    fields: dict[str, str]
    failure: str
    options: dict[str, str]
    environment: dict[str, str]
    device: dict[str, Any]
    memory: int
    memory_available: int
    cores: int
    host_cores: int
    threads: int
    shared_memory: int
    shared_memory_free: int
    open_files: int
    interface: str | None
    interface_mbit: int | None
    busy_cores: float | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return asdict(self)

    def summary(self, host: str) -> dict[str, Any]:
        """What a report says of this rank: of the configuration a digest and the seed.

        Args:
            host: Its host's name in the report.
        """
        found = self.as_dict() | {"host": host}
        fields = found.pop("fields")
        text = "\n".join(f"{name}={value}" for name, value in sorted(fields.items()))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16] if fields else None
        return found | {"config_digest": digest, "seed": fields.get("train.seed")}


def collect_facts(
    world: World,
    device: torch.device,
    threads: int,
    fields: dict[str, str],
    failure: str,
    options: dict[str, str],
    environ: Mapping[str, str],
) -> Facts:
    """Everything but `busy_cores`.

    Args:
        world: The place of this process.
        device: Of this rank.
        threads: Of this rank on the CPU.
        fields: Of the resolved configuration.
        failure: Why there is none; "".
        options: Of the doctor.
        environ: Environment variables, as the launcher gave them.
    """
    memory, available = host_memory()
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    interface = environ.get("GLOO_SOCKET_IFNAME") or route_interface(world.master_addr)
    return Facts(
        rank=world.rank,
        local_rank=world.local_rank,
        node=world.node_rank,
        hostname=socket.gethostname(),
        launcher=world.launcher,
        process=os.getpid(),
        versions=read_versions(device),
        digest=package_digest(Path(moe_train.__file__).parent),
        commit=_commit(Path(moe_train.__file__).parent),
        fields=fields,
        failure=failure,
        options=options,
        environment=chosen_variables(environ),
        device=describe_device(device),
        memory=memory,
        memory_available=available,
        cores=usable_cores(),
        host_cores=os.cpu_count() or 1,
        threads=threads,
        shared_memory=shared.total if shared else 0,
        shared_memory_free=shared.free if shared else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        interface=interface if world.num_nodes > 1 else None,
        interface_mbit=_interface_mbit(interface) if interface and world.num_nodes > 1 else None,
    )


def chosen_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that should be the same on all ranks."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name not in _OWN and (name.startswith(_PREFIXES) or name in _NAMES)
    }


def read_versions(device: torch.device) -> dict[str, str]:
    """Versions by name; of CUDA, HIP, NCCL and the driver those that are there."""
    found = software((*PACKAGES, "numpy"))
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.version.hip:
        found["hip"] = torch.version.hip
    if device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/sys/module/nvidia/version")
        driver = driver if driver.exists() else Path("/sys/module/amdgpu/version")
        if driver.exists():
            found["driver"] = driver.read_text().strip()
    return found


def package_digest(folder: Path) -> str:
    """A digest of the Python files of a package, their names and contents."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


def _commit(folder: Path) -> str | None:
    if not (folder.parent / ".git").exists():
        return None
    command = ["git", "-C", str(folder.parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def describe_device(device: torch.device) -> dict[str, Any]:
    """Kind, name and memory of a device; of a CPU the memory is the host's."""
    if device.type == "cpu":
        memory, available = host_memory()
        return {"kind": "cpu", "name": processor_name(), "memory": memory, "free": available, "uuid": None}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    uuid = getattr(properties, "uuid", None)
    return {"kind": "cuda", "name": properties.name, "memory": total, "free": free, "uuid": uuid and str(uuid)}


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model of the CPU, as Linux names it."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _interface_mbit(interface: str) -> int | None:
    try:
        speed = int(Path("/sys/class/net", interface, "speed").read_text())
    except (OSError, ValueError):  # a list of interfaces, or one that has no speed
        return None
    return speed if speed > 0 else None


def measure_busy_cores() -> float | None:
    """Cores of the host that are at work now, this process asleep; None: not Linux."""
    before = _processor_times()
    time.sleep(_BUSY_SECONDS)
    after = _processor_times()
    if before is None or after is None or after[1] == before[1]:
        return None
    busy, total = after[0] - before[0], after[1] - before[1]
    return busy / total * (os.cpu_count() or 1)


def _processor_times() -> tuple[int, int] | None:
    """Ticks of all cores at work, and of all cores."""
    try:
        numbers = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)  # without idle and waiting for disks
