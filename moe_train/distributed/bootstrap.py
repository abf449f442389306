"""Bootstrap of a started process to a rank of the world: rank discovery, device, CPU threads, torch.distributed.

Only this file imports mpi4py. Only this file, host/ and launch/ read os.environ; other files receive it as an argument.
torch is imported inside the functions that need it, so that a wrong setting is reported before torch is loaded.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_train.config.errors import UsageError
from moe_train.distributed.addresses import (
    SOCKET_INTERFACES,
    accepts_connections,
    free_port,
    interface_addresses,
    interface_value,
    route_interface,
)
from moe_train.distributed.missing_ranks import say_error
from moe_train.distributed.own_local_rank import remember_local_rank
from moe_train.distributed.rendezvous import join_group, open_store, wait_for_ranks
from moe_train.distributed.world import (
    LOOPBACK,
    Launcher,
    Manager,
    World,
    check_manager,
    read_integer,
    read_managers,
    read_step,
    read_world,
    require_equal,
)
from moe_train.host.cores import usable_cores
from moe_train.host.gpus import DEV, prefer_growing_segments, refuse_unusable_gpu

if TYPE_CHECKING:
    import torch

_SETTLE_SECONDS = 0.5  # on two hosts, 24 of 24 starts ended well with this pause, and 13 of 26 without
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def environment() -> MutableMapping[str, str]:
    """Return the environment variables of this process, for files that must not read them themselves."""
    return os.environ


def discover_world(environ: Mapping[str, str] = os.environ) -> World:
    """Find out the rank of this process and where the ranks meet, under any launcher.

    RANK, WORLD_SIZE and related variables (torchrun, deepspeed) have priority, then mpirun, then srun. Without any of
    them the process is alone. After `export_world`, the same world is found again.

    Args:
        environ: Environment variables.

    Returns:
        Place of this process among the ranks.

    Raises:
        UsageError: If variables are missing, malformed or contradictory, or if MPI does not work.

    Collective: All tasks under mpirun, unless RANK is set; this initialises and finalises MPI.
    """
    managers = read_managers(environ)
    for manager in managers:
        check_manager(environ, manager)
        require_equal(manager.size, managers[0].size)
        require_equal(manager.rank, managers[0].rank)
    world = read_world(environ, managers)
    if world is None:
        if not managers or managers[0].size.value == 1:
            launcher: Launcher = managers[0].launcher if managers else "single"
            world = World(0, 1, 0, 1, 1, 0, LOOPBACK, 0, launcher)
        elif managers[0].launcher == "srun":
            world = read_step(environ, managers[0])
        else:
            world = _ask_mpi(environ, managers[0])
    return world if world.master_port else replace(world, master_port=free_port())


def _ask_mpi(environ: Mapping[str, str], manager: Manager) -> World:
    """Find the world of mpirun's tasks through MPI. Collective: All tasks."""
    mpi = _import_mpi(manager)
    world = mpi.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    if (rank, size) != (manager.rank.value, manager.size.value):
        raise UsageError(
            f"mpi4py is rank {rank} of {size}, but {manager.rank} and {manager.size} are set: it is built for another "
            "MPI than mpirun's; install mpi4py for this MPI (pip install --no-binary mpi4py mpi4py), or, with MPICH, "
            "set MPI4PY_MPIABI=mpich and make its libmpich.so.12 loadable as libmpi.so.12"
        )
    host = world.Split_type(mpi.COMM_TYPE_SHARED, key=rank)
    leader = host.bcast(rank)  # the lowest rank of each host
    leaders = sorted(set(world.allgather(leader)))
    address, port = _agree_on_address(environ, world, rank == leader, len(leaders))
    result = World(
        rank=rank,
        world_size=size,
        local_rank=host.Get_rank(),
        local_world_size=host.Get_size(),
        num_nodes=len(leaders),
        node_rank=leaders.index(leader),
        master_addr=address,
        master_port=port,
        launcher="mpirun",
    )
    if len(leaders) > 1:
        # MPICH 4.0 over UCX: while connections were still being set up, one Finalize in two waited without end.
        world.Barrier()
        time.sleep(_SETTLE_SECONDS)
    mpi.Finalize()  # at exit it would wait for all ranks, so that a rank that fails could not end
    return result


def _import_mpi(manager: Manager) -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheels raise RuntimeError if they find no MPI library
        raise UsageError(
            f"{manager.size} is set, but mpi4py cannot be used ({error}): pip install mpi4py, with the library of the "
            "MPI that mpirun belongs to on the loader's path (MPI4PY_MPIABI=mpich for MPICH)"
        ) from error
    return MPI


def _agree_on_address(environ: Mapping[str, str], world: Any, is_leader: bool, num_nodes: int) -> tuple[str, int]:
    """Agree on address and port of rank 0.

    They are MASTER_ADDR and MASTER_PORT of rank 0's environment, or the first address to which all hosts can connect:
    names may not resolve, and interfaces may be private to a host.

    Collective: All tasks.
    """
    address, port = environ.get("MASTER_ADDR", ""), read_integer(environ, "MASTER_PORT")
    wanted = world.bcast((address, port.value if port else 0))
    if wanted[0] or num_nodes == 1:
        return wanted[0] or LOOPBACK, wanted[1] or world.bcast(free_port())
    with contextlib.ExitStack() as stack:
        offer = None
        if world.Get_rank() == 0:
            listener = stack.enter_context(
                socket.create_server(("", wanted[1] or free_port()), backlog=socket.SOMAXCONN)
            )
            offer = (list(interface_addresses().values()), listener.getsockname()[1])
        addresses, port_number = world.bcast(offer)
        reached = [not is_leader or accepts_connections(address, port_number) for address in addresses]
        everywhere = [all(answers) for answers in zip(*world.allgather(reached), strict=True)]
    for address, works in zip(addresses, everywhere, strict=True):
        if works:
            return address, port_number
    raise UsageError(f"no address of rank 0 ({addresses}) can be reached from all {num_nodes} hosts: set MASTER_ADDR")


def choose_device(
    setting: Literal["auto", "cpu", "cuda"], world: World, environ: Mapping[str, str] = os.environ, dev: Path = DEV
) -> torch.device:
    """Choose the device of this rank: the CUDA device of its local rank, the only device that it sees, or the CPU.

    Args:
        setting: parallel.device; auto: cuda if a device is visible, unless DS_ACCELERATOR is cpu.
        world: Place of this process among the ranks.
        environ: Environment variables.
        dev: Folder of device nodes.

    Raises:
        UsageError: If the setting is cuda without a visible device, or auto where torch cannot use the host's GPUs, or
            if a host has more ranks than devices.
    """
    import torch

    accelerator = environ.get("DS_ACCELERATOR", "")
    if setting == "auto" and accelerator:
        setting = "cuda" if accelerator == "cuda" else "cpu"
    elif accelerator and accelerator != setting:
        raise UsageError(f"parallel.device ({setting}) contradicts DS_ACCELERATOR ({accelerator})")
    count = torch.cuda.device_count() if setting != "cpu" and torch.cuda.is_available() else 0
    variable = next((name for name in VISIBLE_DEVICES if name in environ), None)
    restriction = None if variable is None else environ[variable]
    if setting == "auto" and count == 0 and restriction is None:
        refuse_unusable_gpu(dev)
    if setting == "cpu" or (setting == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        seen = "" if restriction is None else f" ({variable} is {restriction!r})"
        raise UsageError(f"parallel.device is cuda, but no CUDA device is visible to torch {torch.__version__}{seen}")
    own_device = count == 1 and restriction is not None and "," not in restriction
    if world.local_world_size > count and not own_device:
        raise UsageError(
            f"the {world.local_world_size} ranks of a host must be at most its CUDA devices ({count}): "
            "one process per device"
        )
    return torch.device("cuda", 0 if own_device else world.local_rank)


def set_threads(setting: int | Literal["auto"], world: World, environ: Mapping[str, str] = os.environ) -> int:
    """Set the number of CPU threads of torch in this rank.

    auto means OMP_NUM_THREADS if the user set it, else the cores that srun gave the task, else the cores of the node
    divided by its ranks. torchrun sets OMP_NUM_THREADS=1 by default, which looks like a user's 1. So under torchrun
    with several ranks per host, 1 does not count; set parallel.threads_per_rank=1 to have it. If a launcher binds each
    rank to cores of its own, those cores are divided once more; set OMP_NUM_THREADS in that case.

    Args:
        setting: parallel.threads_per_rank.
        world: Place of this process among the ranks.
        environ: Environment variables.

    Returns:
        The number of threads.
    """
    import torch

    cores = usable_cores()
    threads = max(1, cores // world.local_world_size) if setting == "auto" else setting
    if setting == "auto":
        first = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has one number per nesting level
        torchrun_default = first == "1" and world.launcher == "torchrun" and world.local_world_size > 1
        per_task = read_integer(environ, "SLURM_CPUS_PER_TASK") if world.launcher == "srun" else None
        if first.isdecimal() and int(first) > 0 and not torchrun_default:
            threads = int(first)
        elif per_task is not None:
            threads = max(1, min(per_task.value, cores))
    torch.set_num_threads(threads)
    return threads


def export_world(
    world: World, device: torch.device | None = None, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Write the world into the environment, where DeepSpeed reads it and so does not ask MPI.

    On several hosts, unless they are set, GLOO_ and NCCL_SOCKET_IFNAME become the interface of the route to rank 0.

    Args:
        world: Place of this process among the ranks.
        device: Device of this rank. For the CPU, DS_ACCELERATOR tells DeepSpeed so, when it is imported later.
        environ: Environment variables to write to.
    """
    # DeepSpeed takes LOCAL_RANK as the device index: 0 if the launcher shows each rank only one device.
    index = device.index if device is not None and device.type == "cuda" else world.local_rank
    environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(index))
    environ.update(MASTER_ADDR=world.master_addr, MASTER_PORT=str(world.master_port))
    environ["LOCAL_WORLD_SIZE"] = str(world.local_world_size)
    remember_local_rank(environ, world.local_rank)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environ:  # DeepSpeed (0.19.8) asserts that both are the same
        environ["OMPI_COMM_WORLD_LOCAL_RANK"] = environ["LOCAL_RANK"]
    interface = route_interface(world.master_addr) if world.num_nodes > 1 else None
    if interface is not None:  # gloo's default is the host's name, which may not resolve, or resolve to loopback
        for name in SOCKET_INTERFACES:
            environ.setdefault(name, interface_value(name, interface))
    if device is not None and device.type == "cpu":
        environ["DS_ACCELERATOR"] = "cpu"
    elif device is not None:
        prefer_growing_segments(environ)


def init_process_group(
    world: World, device: torch.device, timeout_seconds: float, say: Callable[[str], None] = say_error
) -> None:
    """Join torch.distributed with gloo, and on CUDA also NCCL, so that tensors on both devices can be reduced.

    Args:
        world: Place of this process among the ranks.
        device: Device of this rank, from `choose_device`.
        timeout_seconds: Timeout of a collective operation.
        say: Called with a message if ranks are missing after a while.

    Raises:
        UsageError: On every rank, if the master's port is taken.

    Collective: All ranks.
    """
    import torch.distributed as dist

    if dist.is_initialized():  # by an earlier use in the same process
        return
    timeout = timedelta(seconds=timeout_seconds)
    export_world(world, device)
    store = open_store(world, timeout, os.environ, say)
    wait_for_ranks(store, world, timeout, os.environ, say)
    join_group(store, world, device, timeout)


def leave_process_group(code: int) -> None:
    """End this process with an exit code if it is in a process group; otherwise do nothing.

    The interpreter's own exit destroys the groups while their threads still run, and sometimes aborts (gloo of torch
    2.13: "terminate called without an active exception", after all work was done).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # it is closed, or full
            stream.flush()
    os._exit(code)


def destroy_process_groups() -> None:
    """Destroy all process groups, so that another run can begin in this process. Collective: All ranks."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process prints messages before the ranks have met."""
    return rank_number(environ) == "0"


def rank_number(environ: Mapping[str, str] = os.environ) -> str:
    """Return the rank of this process for messages before the ranks have met, according to its environment."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((environ[name] for name in names if name in environ), "0")


def child_environment(world: World, *, one_thread: bool, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Build the environment of a child process at a place in a world, without the variables of this one's launcher.

    Args:
        world: Place of the child process.
        one_thread: Whether it gets one CPU thread, because several ranks share few cores.
        environ: Environment variables of this process.
    """
    launchers = ("OMPI_", "PMI", "PMIX_", "SLURM_", "TORCHELASTIC_", "GROUP_", "CROSS_", "ROLE_", "LOCAL_", "MPI_")
    kept = {name: value for name, value in environ.items() if not name.startswith(launchers)}
    kept |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.world_size), "LOCAL_RANK": str(world.local_rank)}
    kept |= {"LOCAL_WORLD_SIZE": str(world.local_world_size), "MASTER_ADDR": world.master_addr}
    kept["MASTER_PORT"] = str(world.master_port)
    return kept | ({"OMP_NUM_THREADS": "1"} if one_thread else {})


def local_rank_environments(num_ranks: int, environ: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Build the environments of CPU ranks on this machine, with a free port and one thread per rank."""
    port = free_port()
    worlds = [World(r, num_ranks, r, num_ranks, 1, 0, LOOPBACK, port, "environment") for r in range(num_ranks)]
    return [child_environment(w, one_thread=True, environ=environ) | {"DS_ACCELERATOR": "cpu"} for w in worlds]
