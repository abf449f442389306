"""Facts of one rank: versions, code, configuration, environment, device and host."""

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

from moe_train.distributed.addresses import route_interface
from moe_train.distributed.world import World
from moe_train.host.cores import usable_cores
from moe_train.host.infiniband import infiniband_obstacles
from moe_train.host.memory import host_memory
from moe_train.host.versions import PACKAGES, software
from moe_train.ops.kernels import try_kernel

# Variables that change what training computes, or how fast. Variables that each rank sets for itself are left out.
_PREFIXES = (
    *("NCCL_", "RCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "KMP_", "GOMP_"),
    *("OPENBLAS_", "PYTORCH_", "CUBLAS_", "CUDNN_", "CUDA_", "HSA_", "DS_", "TRITON_", "TORCH_ALLOW_TF32"),
)
_NAMES = ("LD_PRELOAD", "PYTHONHASHSEED", "MALLOC_ARENA_MAX", "TORCH_LOGS")
# Variables that a launcher or host sets for itself, that a rank sets for its own cores and files, or that only one
# process needs. `import deepspeed` sets the last: ranks inherit it from a launcher that imported deepspeed, others not.
_OWN = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_CACHE_PATH"),
    *("DS_ENV_FILE", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "TRITON_CACHE_DIR"),
    *("NCCL_HOSTID", "NCCL_DEBUG_FILE", "NCCL_TOPO_DUMP_FILE", "NCCL_GRAPH_DUMP_FILE"),
    *("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"),
    "PYTORCH_NVML_BASED_CUDA_CHECK",
)
_GIT_SECONDS = 5
_BUSY_SECONDS = 0.25

_PACKAGE = Path(__file__).resolve().parents[1]  # moe_train/


@dataclass(frozen=True)
class Facts:
    """Facts of one rank. Sizes are in bytes; None or an empty value means that it is not known here.

    Attributes:
        rank, local_rank, node: Place of the rank; node is the host's number as the launcher counts.
        hostname: Name of the rank's host, as the host gives it.
        launcher: Launcher that started the rank.
        process: Process id on the host.
        versions: Versions of Python, packages, NCCL, CUDA and the driver, by name.
        digest: Digest of the contents of the package's files.
        commit: Commit of the package's git checkout.
        fields: Resolved configuration, by dotted name; empty without one.
        failure: Reason why this rank has no configuration or device; "" if it has both.
        options: Options of the doctor that must be the same on all ranks.
        environment: Environment variables that must be the same on all ranks.
        device: Kind ("cpu" or "cuda"), name, memory, free memory and, on CUDA, UUID of the device.
        memory, memory_available: Memory of the host, or what its control group grants.
        cores: Cores that this process may use.
        host_cores: Cores of the host.
        threads: CPU threads of one rank.
        shared_memory, shared_memory_free: Size and free space of /dev/shm.
        open_files: Files that this process may have open.
        interface, interface_mbit: Network interface to the other hosts, and its speed according to the system, in
            megabits per second.
        kernel_failure: Why Triton's kernels do not run here; "": they do, or are not needed.
        infiniband_obstacles: What keeps NCCL from the host's InfiniBand; empty: nothing, or there is none.
        busy_cores: Cores of the host that other work uses; known on the first rank of each host only.
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
    kernel_failure: str = ""
    infiniband_obstacles: list[str] = field(default_factory=list)
    busy_cores: float | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def summary(self, host: str) -> dict[str, Any]:
        """Return what the report says about this rank: a digest and the seed in place of the whole configuration.

        Args:
            host: Name of the rank's host in the report.
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
    """Collect the facts of this rank, all except `busy_cores`.

    Args:
        world: Place of this process among the ranks.
        device: Device of this rank.
        threads: CPU threads of this rank.
        fields: Resolved configuration, by dotted name.
        failure: Reason why there is no configuration or device; "" if there is.
        options: Options of the doctor.
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
        digest=package_digest(_PACKAGE),
        commit=_commit(_PACKAGE),
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
        kernel_failure=_kernel_failure(device),
        infiniband_obstacles=infiniband_obstacles() if device.type == "cuda" and world.num_nodes > 1 else [],
    )


def _kernel_failure(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    try:
        try_kernel(device)
    except Exception as error:  # whatever Triton raises: it is the finding
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def chosen_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that should be the same on all ranks."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name not in _OWN and (name.startswith(_PREFIXES) or name in _NAMES)
    }


def read_versions(device: torch.device) -> dict[str, str]:
    """Return versions by name, with CUDA, HIP, NCCL and the driver where present."""
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
    """Compute a digest of a package's Python files, from their names and contents."""
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
    """Return kind, name, memory and UUID of a device; for a CPU, the memory is the host's."""
    if device.type == "cpu":
        memory, available = host_memory()
        return {"kind": "cpu", "name": processor_name(), "memory": memory, "free": available, "uuid": None}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    uuid = getattr(properties, "uuid", None)
    return {"kind": "cuda", "name": properties.name, "memory": total, "free": free, "uuid": uuid and str(uuid)}


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model name of the CPU, as Linux gives it."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _interface_mbit(interface: str) -> int | None:
    try:
        speed = int(Path("/sys/class/net", interface, "speed").read_text())
    except (OSError, ValueError):  # `interface` is a list, or has no speed
        return None
    return speed if speed > 0 else None


def measure_busy_cores() -> float | None:
    """Measure how many cores of the host are at work while this process sleeps; None if the system is not Linux."""
    before = _processor_times()
    time.sleep(_BUSY_SECONDS)
    after = _processor_times()
    if before is None or after is None or after[1] == before[1]:
        return None
    busy, total = after[0] - before[0], after[1] - before[1]
    return busy / total * (os.cpu_count() or 1)


def _processor_times() -> tuple[int, int] | None:
    """Return the ticks of all cores: those at work, and all."""
    try:
        numbers = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)  # without idle time and waiting for disks
