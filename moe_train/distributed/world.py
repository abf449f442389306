"""World of ranks as launchers describe it in environment variables, and contradictions between these variables.

Pure: it reads a mapping and starts nothing. bootstrap.py does what needs a request, through MPI or for a free port. The
rank of a process may be written down twice: by the launcher or agent nearest to it (RANK, WORLD_SIZE, ...: torchrun,
deepspeed, or a user's script), and by the manager of the tasks (mpirun or srun). Both must agree: otherwise N tasks
would silently become N trainings of one rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_train.config.errors import UsageError
from moe_train.distributed.own_local_rank import has_own_local_rank, with_own_local_rank
from moe_train.distributed.slurm import derive_port, expand_nodelist, expand_tasks_per_node, is_step_task

LOOPBACK = "127.0.0.1"
MAX_PORT = 65535

Launcher = Literal["deepspeed", "torchrun", "mpirun", "srun", "single", "environment"]


@dataclass(frozen=True)
class World:
    """Place of this process among the ranks.

    Attributes:
        rank: Global rank of this process.
        world_size: Number of ranks.
        local_rank: Rank of this process on its host.
        local_world_size: Number of ranks on this host.
        num_nodes: Number of hosts.
        node_rank: Number of this host.
        master_addr: Address of rank 0's host.
        master_port: Port where the ranks meet; 0 until a port is chosen, only with a world size of 1.
        launcher: Launcher that started the rank; "environment": RANK and the rest were set by an unknown one.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_nodes: int
    node_rank: int
    master_addr: str
    master_port: int
    launcher: Launcher


@dataclass(frozen=True)
class Variable:
    """Environment variable with an integer value; its text has both name and value, for messages."""

    name: str
    value: int

    def __str__(self) -> str:
        return f"{self.name} ({self.value})"


@dataclass(frozen=True)
class Manager:
    """What mpirun or srun wrote down about the task that it started.

    Attributes:
        launcher: "mpirun" or "srun".
        size: Number of tasks.
        rank: Rank of the task.
        local_rank: Rank of the task on its host; None: not known.
        local_size: Number of tasks on the host; None: not known.
    """

    launcher: Launcher
    size: Variable
    rank: Variable
    local_rank: Variable | None
    local_size: Variable | None


def read_integer(environ: Mapping[str, str], *names: str) -> Variable | None:
    """Read the first of some variables that is set.

    Args:
        environ: Environment variables.
        names: Names of the variables, in the order of preference.

    Returns:
        The variable; None if none is set.

    Raises:
        UsageError: If its value is not a whole number of at least 0.
    """
    for name in names:
        text = environ.get(name, "").strip()
        if text:
            if not (text.isascii() and text.isdecimal()):
                raise UsageError(f"{name} ({text!r}) must be a whole number of at least 0")
            return Variable(name, int(text))
    return None


def require_integer(environ: Mapping[str, str], name: str, reason: object) -> Variable:
    """Read a variable that must be set, because another one is.

    Args:
        environ: Environment variables.
        name: Name of the variable.
        reason: Variable that requires it, for the message.

    Raises:
        UsageError: If it is not set, or its value is not a whole number of at least 0.
    """
    variable = read_integer(environ, name)
    if variable is None:
        raise UsageError(f"{reason} is set without {name}")
    return variable


def require_below(value: Variable, bound: Variable) -> None:
    """Raise UsageError, with both names and both values, unless value < bound."""
    if value.value >= bound.value:
        raise UsageError(f"{value} must be less than {bound}")


def require_equal(given: Variable | None, expected: Variable | None) -> None:
    """Raise UsageError, with both names and both values, if both variables are known and differ."""
    if given is not None and expected is not None and given.value != expected.value:
        raise UsageError(
            f"{given} contradicts {expected}: unset {given.name}, or start a torchrun or deepspeed agent in each task"
        )


def read_managers(environ: Mapping[str, str]) -> list[Manager]:
    """Read which managers started this process as a task, the one with priority first; [] if there is none.

    A task of mpirun may see the variables of the Slurm step that started mpirun's daemons. They do not describe the
    task.

    Args:
        environ: Environment variables.

    Raises:
        UsageError: If a variable is missing or not an integer.
    """
    mpi = _read_mpi(environ)
    if not is_step_task(environ):
        return [mpi] if mpi else []
    if mpi and mpi.local_rank:
        return [mpi]
    ntasks = read_integer(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    rank = require_integer(environ, "SLURM_PROCID", "SLURM_STEP_ID")
    if ntasks is None:
        raise UsageError(f"{rank} is set without SLURM_NTASKS")
    slurm = Manager("srun", ntasks, rank, read_integer(environ, "SLURM_LOCALID"), None)
    return [slurm, mpi] if mpi else [slurm]  # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE, but no local rank


def _read_mpi(environ: Mapping[str, str]) -> Manager | None:
    for prefix, local_rank, local_size in (
        ("OMPI_COMM_WORLD_", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Hydra: MPICH, Intel MPI
    ):
        size = read_integer(environ, prefix + "SIZE")
        if size is not None:
            rank = require_integer(environ, prefix + "RANK", size)
            return Manager("mpirun", size, rank, read_integer(environ, local_rank), read_integer(environ, local_size))
    return None


def check_manager(environ: Mapping[str, str], manager: Manager) -> None:
    """Compare RANK, WORLD_SIZE and LOCAL_RANK, where set, with what a manager wrote.

    Args:
        environ: Environment variables.
        manager: Manager that started this process.

    Raises:
        UsageError: If they contradict each other, with both names and both values.
    """
    require_below(manager.rank, manager.size)
    world_size = read_integer(environ, "WORLD_SIZE")
    if _is_agent_rank(environ):  # the task is an agent that starts ranks; it must have found the other tasks' agents
        counted = read_integer(environ, "GROUP_WORLD_SIZE", "CROSS_SIZE") or world_size
        if counted is not None and (counted.value == 0 or counted.value % manager.size.value):
            raise UsageError(
                f"{counted} is no multiple of {manager.size}: {world_size}, but the agents of all tasks must form one "
                "world; give torchrun --nnodes and --rdzv-endpoint, or start one task; in a shell inside srun, "
                "unset SLURM_PROCID"
            )
        return
    require_equal(world_size, manager.size)
    require_equal(read_integer(environ, "RANK"), manager.rank)
    if not has_own_local_rank(environ):
        require_equal(read_integer(environ, "LOCAL_RANK"), manager.local_rank)


def _is_agent_rank(environ: Mapping[str, str]) -> bool:
    return "RANK" in environ and _name_launcher(environ, []) in ("torchrun", "deepspeed")


def _name_launcher(environ: Mapping[str, str], managers: list[Manager]) -> Launcher:
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    if "CROSS_RANK" in environ and "LOCAL_SIZE" in environ:
        return "deepspeed"
    if managers:
        return managers[0].launcher
    return "single" if environ.get("WORLD_SIZE", "1").strip() == "1" else "environment"


def read_world(environ: Mapping[str, str], managers: list[Manager]) -> World | None:
    """Read the world that RANK, WORLD_SIZE, LOCAL_RANK and related variables describe.

    Args:
        environ: Environment variables.
        managers: Managers of `read_managers`.

    Returns:
        The world; None if RANK is not set.

    Raises:
        UsageError: If variables are missing, out of range or not integers.
    """
    rank = read_integer(environ, "RANK")
    if rank is None:
        for name in ("WORLD_SIZE", "LOCAL_RANK"):
            if not managers and (alone := read_integer(environ, name)) is not None:
                raise UsageError(f"{alone} is set without RANK")
        return None
    world_size = require_integer(environ, "WORLD_SIZE", rank)
    require_below(rank, world_size)
    local_rank, local_size = _read_local(environ, managers, world_size)
    require_below(local_rank, local_size)
    if local_size.value > world_size.value:
        raise UsageError(f"{local_size} must be at most {world_size}")
    num_nodes = read_integer(environ, "GROUP_WORLD_SIZE", "CROSS_SIZE")
    node_rank = read_integer(environ, "GROUP_RANK", "CROSS_RANK")
    return World(
        rank=rank.value,
        world_size=world_size.value,
        local_rank=local_rank.value,
        local_world_size=local_size.value,
        num_nodes=num_nodes.value if num_nodes else -(-world_size.value // local_size.value),
        node_rank=node_rank.value if node_rank else rank.value // local_size.value,
        master_addr=_read_address(environ, world_size),
        master_port=_read_port(environ, world_size),
        launcher=_name_launcher(environ, managers),
    )


def _read_local(environ: Mapping[str, str], managers: list[Manager], world_size: Variable) -> tuple[Variable, Variable]:
    """Read rank and number of ranks on this host, from the manager if the launcher does not set them."""
    local_rank = read_integer(with_own_local_rank(environ), "LOCAL_RANK")
    local_size = read_integer(environ, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    if managers and not _is_agent_rank(environ):
        local_rank = local_rank or managers[0].local_rank
        local_size = local_size or managers[0].local_size
        if local_size is None and managers[0].launcher == "srun":
            local_size = Variable("the tasks of the host", read_step(environ, managers[0]).local_world_size)
    if world_size.value == 1:
        local_rank = local_rank or Variable("LOCAL_RANK", 0)
        local_size = local_size or Variable("LOCAL_WORLD_SIZE", 1)
    if local_rank is None or local_size is None:
        missing = "LOCAL_RANK" if local_rank is None else "LOCAL_WORLD_SIZE"
        raise UsageError(f"{world_size} is set without {missing}")
    return local_rank, local_size


def _read_address(environ: Mapping[str, str], world_size: Variable) -> str:
    address = environ.get("MASTER_ADDR", "").strip()
    if address or world_size.value == 1:
        return address or LOOPBACK
    if not is_step_task(environ):
        raise UsageError(f"{world_size} is set without MASTER_ADDR")
    hosts = _step_hosts(environ)
    return hosts[0] if len(hosts) > 1 else LOOPBACK


def _read_port(environ: Mapping[str, str], world_size: Variable) -> int:
    port = read_integer(environ, "MASTER_PORT")
    if port is not None:
        if not 0 < port.value <= MAX_PORT:
            raise UsageError(f"{port} must be from 1 to {MAX_PORT}")
        return port.value
    if world_size.value == 1:
        return 0
    if not is_step_task(environ):
        raise UsageError(f"{world_size} is set without MASTER_PORT")
    step = require_integer(environ, "SLURM_STEP_ID", world_size)
    return derive_port(require_integer(environ, "SLURM_JOB_ID", step).value, step.value)


def _step_hosts(environ: Mapping[str, str]) -> list[str]:
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    return expand_nodelist(nodelist) if nodelist else []


def read_step(environ: Mapping[str, str], manager: Manager) -> World:
    """Read the world of a Slurm step's tasks; on several hosts, the master is the first host of the step.

    Args:
        environ: Environment variables.
        manager: Manager with the launcher "srun".

    Raises:
        UsageError: If variables are missing or contradict each other.
    """
    size, rank = manager.size, manager.rank
    local_rank = require_integer(environ, "SLURM_LOCALID", rank)
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if per_node:
        counts = expand_tasks_per_node(per_node)
    else:
        num_nodes = max(1, len(_step_hosts(environ)))
        counts = [size.value // num_nodes] * num_nodes
    if sum(counts) != size.value:
        raise UsageError(f"SLURM_TASKS_PER_NODE ({per_node or counts}) contradicts {size}: its sum is {sum(counts)}")
    node_rank = read_integer(environ, "SLURM_NODEID") or Variable("SLURM_NODEID", rank.value // max(1, counts[0]))
    require_below(node_rank, Variable("the number of hosts", len(counts)))
    local_size = Variable("the tasks of the host", counts[node_rank.value])
    require_below(local_rank, local_size)
    world_size = Variable("SLURM_NTASKS", size.value)
    return World(
        rank=rank.value,
        world_size=size.value,
        local_rank=local_rank.value,
        local_world_size=local_size.value,
        num_nodes=len(counts),
        node_rank=node_rank.value,
        master_addr=_read_address(environ, world_size),
        master_port=_read_port(environ, world_size),
        launcher="srun",
    )


def check_nodes(node_size: int | None, world: World) -> None:
    """Check that the ranks of each node are consecutive and match the launcher's hosts, as two-level dispatch needs.

    Args:
        node_size: Number of consecutive ranks per node; None: no requirement.
        world: Place of this process among the ranks.

    Raises:
        UsageError: If the launcher puts other ranks on a host than the node of that size has.
    """
    if node_size == world.local_world_size and world.rank // node_size != world.node_rank:
        raise UsageError(
            f"parallel.dispatch (two_level) needs the ranks of a host to be consecutive, but rank {world.rank} of "
            f"{node_size} a host is on host {world.node_rank}: let the launcher fill one host after the other"
        )
