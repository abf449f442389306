"""Rank discovery as a table of environments: what each launcher sets, and every contradiction with both its sides."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config.errors import UsageError
from moe_train.distributed.addresses import accepts_connections, free_port, interface_addresses, route_interface
from moe_train.distributed.bootstrap import choose_device, discover_world, export_world, set_threads
from moe_train.distributed.mesh import expert_data_parallel_ranks, expert_parallel_ranks
from moe_train.distributed.own_local_rank import OWN_LOCAL_RANK
from moe_train.distributed.rendezvous import join_group
from moe_train.distributed.slurm import derive_port, expand_nodelist, expand_tasks_per_node
from moe_train.distributed.world import World
from moe_train.host.cores import cpu_quotas, usable_cores

ROOT = Path(__file__).resolve().parents[2]
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "4321"}
RANKS = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
TORCHRUN = {
    **RANKS,
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {**RANKS, "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
SLURM = {
    "SLURM_JOB_ID": "70",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
SLURM_PORT = 10000 + 70 * 101
AGENT_TASK = {**SLURM, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}  # one torchrun in each
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
MAPPED = {"RANK": "3", "WORLD_SIZE": "4", **MASTER}  # set by hand, in each task of a manager
SINGLE_TASK = {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(TORCHRUN, World(5, 8, 1, 4, 2, 1, "node1", 4321, "torchrun"), id="torchrun"),
        pytest.param(DEEPSPEED, World(5, 8, 1, 4, 2, 1, "node1", 4321, "deepspeed"), id="deepspeed"),
        pytest.param(
            {**RANKS, "LOCAL_WORLD_SIZE": "4"}, World(5, 8, 1, 4, 2, 1, "node1", 4321, "environment"), id="by hand"
        ),
        pytest.param(SLURM, World(3, 4, 1, 2, 2, 1, "node08", SLURM_PORT, "srun"), id="srun"),
        pytest.param(SLURM | MASTER, World(3, 4, 1, 2, 2, 1, "node1", 4321, "srun"), id="srun, master set"),
        pytest.param(
            {**SLURM, "WORLD_SIZE": "4", **MASTER}, World(3, 4, 1, 2, 2, 1, "node1", 4321, "srun"), id="srun, size set"
        ),
        pytest.param(
            {**SLURM, "SLURM_STEP_NODELIST": "node7", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"},
            World(3, 4, 1, 4, 1, 0, "127.0.0.1", SLURM_PORT, "srun"),
            id="srun on one host",
        ),
        pytest.param(
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "2"},
            World(3, 4, 2, 3, 2, 1, "node08", SLURM_PORT, "srun"),
            id="srun, uneven hosts",
        ),
        pytest.param(
            {name: value for name, value in SLURM.items() if name not in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")},
            World(3, 4, 1, 2, 2, 1, "node08", SLURM_PORT, "srun"),
            id="srun, few variables",
        ),
        pytest.param(
            {**SLURM, "PMI_SIZE": "4", "PMI_RANK": "3"},
            World(3, 4, 1, 2, 2, 1, "node08", SLURM_PORT, "srun"),
            id="srun --mpi=pmi2",
        ),
        pytest.param(SLURM | MAPPED, World(3, 4, 1, 2, 2, 1, "node1", 4321, "srun"), id="srun, RANK mapped"),
        pytest.param(OPEN_MPI | MAPPED, World(3, 4, 1, 2, 2, 1, "node1", 4321, "mpirun"), id="Open MPI, RANK mapped"),
        pytest.param(HYDRA | MAPPED, World(3, 4, 1, 2, 2, 1, "node1", 4321, "mpirun"), id="Hydra, RANK mapped"),
        pytest.param(
            SINGLE_TASK | OPEN_MPI | MAPPED, World(3, 4, 1, 2, 2, 1, "node1", 4321, "mpirun"), id="mpirun's Slurm step"
        ),
        pytest.param(
            AGENT_TASK | TORCHRUN, World(5, 8, 1, 4, 2, 1, "node1", 4321, "torchrun"), id="torchrun in srun tasks"
        ),
        pytest.param(
            AGENT_TASK | DEEPSPEED, World(5, 8, 1, 4, 2, 1, "node1", 4321, "deepspeed"), id="deepspeed in srun tasks"
        ),
        pytest.param(
            {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"} | TORCHRUN,
            World(5, 8, 1, 4, 2, 1, "node1", 4321, "torchrun"),
            id="torchrun in mpirun tasks",
        ),
        pytest.param(
            {**SLURM, "SLURM_STEP_ID": "4294967291"} | TORCHRUN,
            World(5, 8, 1, 4, 2, 1, "node1", 4321, "torchrun"),
            id="torchrun in a batch script",
        ),
    ],
)
def test_world_of_each_launcher(environ: dict[str, str], expected: World) -> None:
    assert discover_world(environ) == expected


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        pytest.param({}, "single", id="no launcher"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, "single", id="size 1 by hand"),
        pytest.param({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "single", id="batch script"),
        pytest.param({**SLURM, "SLURM_STEP_ID": "4294967290"}, "single", id="interactive shell"),
        pytest.param(
            {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun", id="mpirun -n 1"
        ),
        pytest.param({**SINGLE_TASK, "SLURM_LOCALID": "0"}, "srun", id="srun -n 1"),
    ],
)
def test_world_of_one_process(environ: dict[str, str], launcher: str) -> None:
    world = discover_world(environ)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (0, 1, 0, 1)
    assert (world.num_nodes, world.node_rank, world.launcher) == (1, 0, launcher)
    assert world.master_addr == "127.0.0.1"
    assert world.master_port > 0


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        pytest.param({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, ["WORLD_SIZE (1)", "SLURM_NTASKS (4)"], id="1 of 4"),
        pytest.param({**SLURM, "WORLD_SIZE": "1"}, ["WORLD_SIZE (1)", "SLURM_NTASKS (4)"], id="size alone"),
        pytest.param(SLURM | MAPPED | {"RANK": "2"}, ["RANK (2)", "SLURM_PROCID (3)"], id="rank and task"),
        pytest.param(
            SLURM | MAPPED | {"LOCAL_RANK": "0"}, ["LOCAL_RANK (0)", "SLURM_LOCALID (1)"], id="local rank and task"
        ),
        pytest.param({**OPEN_MPI, "WORLD_SIZE": "1"}, ["WORLD_SIZE (1)", "OMPI_COMM_WORLD_SIZE (4)"], id="Open MPI"),
        pytest.param(OPEN_MPI | MAPPED | {"RANK": "2"}, ["RANK (2)", "OMPI_COMM_WORLD_RANK (3)"], id="Open MPI rank"),
        pytest.param({**HYDRA, "RANK": "0", "WORLD_SIZE": "1"}, ["WORLD_SIZE (1)", "PMI_SIZE (4)"], id="Hydra"),
        pytest.param({**SLURM, "PMI_SIZE": "1", "PMI_RANK": "0"}, ["PMI_SIZE (1)", "SLURM_NTASKS (4)"], id="pmi2"),
        pytest.param(
            AGENT_TASK | TORCHRUN | {"GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "8"},
            ["GROUP_WORLD_SIZE (1)", "SLURM_NTASKS (2)", "WORLD_SIZE (8)"],
            id="torchrun agents that do not know each other",
        ),
        pytest.param(
            SLURM | without(TORCHRUN, "GROUP_WORLD_SIZE") | {"WORLD_SIZE": "6"},
            ["WORLD_SIZE (6)", "SLURM_NTASKS (4)"],
            id="torchrun, no multiple",
        ),
        pytest.param(AGENT_TASK | DEEPSPEED | {"CROSS_SIZE": "1"}, ["CROSS_SIZE (1)", "SLURM_NTASKS (2)"], id="agents"),
        pytest.param({"RANK": "1"}, ["RANK (1)", "WORLD_SIZE"], id="rank without size"),
        pytest.param({"WORLD_SIZE": "4"}, ["WORLD_SIZE (4)", "RANK"], id="size without rank"),
        pytest.param({"LOCAL_RANK": "1"}, ["LOCAL_RANK (1)", "RANK"], id="local rank without rank"),
        pytest.param({**TORCHRUN, "RANK": "x"}, ["RANK ('x')"], id="rank is text"),
        pytest.param({**TORCHRUN, "WORLD_SIZE": "2.0"}, ["WORLD_SIZE ('2.0')"], id="size is a fraction"),
        pytest.param({**TORCHRUN, "LOCAL_RANK": "-1"}, ["LOCAL_RANK ('-1')"], id="negative local rank"),
        pytest.param({**SLURM, "SLURM_NTASKS": "four"}, ["SLURM_NTASKS ('four')"], id="tasks are text"),
        pytest.param({**TORCHRUN, "RANK": "8"}, ["RANK (8)", "WORLD_SIZE (8)"], id="rank out of range"),
        pytest.param({**SLURM, "SLURM_PROCID": "4"}, ["SLURM_PROCID (4)", "SLURM_NTASKS (4)"], id="task out of range"),
        pytest.param({**TORCHRUN, "LOCAL_RANK": "4"}, ["LOCAL_RANK (4)", "LOCAL_WORLD_SIZE (4)"], id="local range"),
        pytest.param(
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE (9)", "WORLD_SIZE (8)"], id="local size range"
        ),
        pytest.param(RANKS, ["WORLD_SIZE (8)", "LOCAL_WORLD_SIZE"], id="no local size"),
        pytest.param(without(TORCHRUN, "LOCAL_RANK"), ["WORLD_SIZE (8)", "LOCAL_RANK"], id="no local rank"),
        pytest.param(without(TORCHRUN, "MASTER_ADDR"), ["WORLD_SIZE (8)", "MASTER_ADDR"], id="no address"),
        pytest.param(without(TORCHRUN, "MASTER_PORT"), ["WORLD_SIZE (8)", "MASTER_PORT"], id="no port"),
        pytest.param({**TORCHRUN, "MASTER_PORT": "70000"}, ["MASTER_PORT (70000)", "65535"], id="port out of range"),
        pytest.param(without(SLURM, "SLURM_NTASKS"), ["SLURM_PROCID (3)", "SLURM_NTASKS"], id="no tasks"),
        pytest.param(without(SLURM, "SLURM_LOCALID"), ["SLURM_PROCID (3)", "SLURM_LOCALID"], id="no local id"),
        pytest.param(without(SLURM, "SLURM_JOB_ID"), ["SLURM_STEP_ID (0)", "SLURM_JOB_ID"], id="no job"),
        pytest.param(
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, ["2(x3)", "SLURM_NTASKS (4)", "6"], id="tasks per node"
        ),
        pytest.param({**SLURM, "SLURM_NODEID": "2"}, ["SLURM_NODEID (2)", "hosts (2)"], id="node out of range"),
        pytest.param({**SLURM, "SLURM_LOCALID": "2"}, ["SLURM_LOCALID (2)", "(2)"], id="local id out of range"),
        pytest.param(without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), ["SIZE (4)", "OMPI_COMM_WORLD_RANK"], id="half of MPI"),
    ],
)
def test_contradictions_name_both_sides(environ: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        discover_world(environ)
    for part in parts:
        assert part in str(caught.value)


def test_mpirun_without_mpi4py_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # an import of it raises ImportError
    with pytest.raises(UsageError, match=r"OMPI_COMM_WORLD_SIZE \(4\) is set, but mpi4py.*pip install mpi4py"):
        discover_world(OPEN_MPI)


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, SLURM, {}], ids=["torchrun", "deepspeed", "srun", "single"])
def test_exported_world_is_found_again(environ: dict[str, str]) -> None:
    world = discover_world(environ)
    exported = dict(environ)
    export_world(world, environ=exported)
    assert discover_world(exported) == world
    assert exported["RANK"] == str(world.rank)
    assert exported["MASTER_PORT"] == str(world.master_port)


def test_world_of_a_rank_with_one_visible_gpu_is_found_again() -> None:
    """DeepSpeed takes LOCAL_RANK as the device's number, and asserts that Open MPI's is the same."""
    environ = OPEN_MPI | MAPPED
    world = discover_world(environ)
    assert world.local_rank == 1
    exported = dict(environ)
    export_world(world, torch.device("cuda", 0), exported)
    assert exported["LOCAL_RANK"] == exported["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"
    assert discover_world(exported) == world


def test_gpu_memory_grows_in_segments_unless_told() -> None:
    world = discover_world({})
    for device, before, expected in (
        ("cuda:0", {}, "expandable_segments:True"),
        ("cuda:0", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
        ("cuda:0", {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ("cpu", {}, None),
    ):
        environ = dict(before)
        export_world(world, torch.device(device), environ)
        assert environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("n[08-10,3]-x,b", ["n08-x", "n09-x", "n10-x", "n3-x", "b"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("c[998-1001]", ["c998", "c999", "c1000", "c1001"]),
    ],
)
def test_nodelist(nodelist: str, hosts: list[str]) -> None:
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "a[1-", "a[x-y]", "a]b", "a[]"])
def test_malformed_nodelist_is_refused(nodelist: str) -> None:
    with pytest.raises(UsageError, match="host list"):
        expand_nodelist(nodelist)


def test_tasks_per_node() -> None:
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UsageError, match="tasks per node '2x3'"):
        expand_tasks_per_node("2x3")


@given(job=st.integers(0, 2**31), step=st.integers(0, 90))
def test_derived_port_is_valid_and_differs_from_the_next_steps_and_job(job: int, step: int) -> None:
    port = derive_port(job, step)
    assert 1024 < port < 32768
    assert port not in (derive_port(job, step + 1), derive_port(job + 1, 0), derive_port(job + 1, step))


@given(num_groups=st.integers(1, 8), ep_size=st.integers(1, 8))
def test_expert_groups_partition_the_ranks_and_meet_in_one(num_groups: int, ep_size: int) -> None:
    world_size = num_groups * ep_size
    consecutive = expert_parallel_ranks(world_size, ep_size)
    strided = expert_data_parallel_ranks(world_size, ep_size)
    assert [rank for ranks in consecutive for rank in ranks] == list(range(world_size))
    assert sorted(rank for ranks in strided for rank in ranks) == list(range(world_size))
    assert all(len(set(a) & set(b)) == 1 for a in consecutive for b in strided)


def test_expert_groups_of_eight_ranks() -> None:
    assert [list(ranks) for ranks in expert_parallel_ranks(8, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(ranks) for ranks in expert_data_parallel_ranks(8, 4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def local_world(local_rank: int, local_world_size: int, launcher: str = "torchrun") -> World:
    return World(local_rank, local_world_size, local_rank, local_world_size, 1, 0, "127.0.0.1", 1234, launcher)


@pytest.mark.parametrize(
    ("setting", "devices", "environ", "expected"),
    [
        ("cpu", 2, {}, "cpu"),
        ("auto", 0, {}, "cpu"),
        ("auto", 2, {}, "cuda:1"),
        ("auto", 2, {"DS_ACCELERATOR": "cpu"}, "cpu"),
        ("cuda", 2, {}, "cuda:1"),
        ("cuda", 4, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "cuda:1"),
        ("cuda", 1, {"CUDA_VISIBLE_DEVICES": "1"}, "cuda:0"),
    ],
)
def test_device_of_local_rank_1_of_2(
    setting: str, devices: int, environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    assert str(choose_device(setting, local_world(1, 2), environ)) == expected


@pytest.mark.parametrize(
    ("setting", "devices", "environ", "message"),
    [
        ("cuda", 0, {}, "no CUDA device is visible"),
        ("cuda", 0, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is ''"),
        ("cuda", 2, {}, r"3 ranks of a host .* CUDA devices \(2\)"),
        ("auto", 1, {}, r"3 ranks of a host .* CUDA devices \(1\)"),
        ("cuda", 1, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, r"3 ranks of a host .* CUDA devices \(1\)"),
        ("cuda", 4, {"DS_ACCELERATOR": "cpu"}, r"device \(cuda\) contradicts DS_ACCELERATOR \(cpu\)"),
        ("cpu", 4, {"DS_ACCELERATOR": "cuda"}, r"device \(cpu\) contradicts DS_ACCELERATOR \(cuda\)"),
    ],
)
def test_device_that_cannot_be_had(
    setting: str, devices: int, environ: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    with pytest.raises(UsageError, match=message):
        choose_device(setting, local_world(2, 3), environ)


def test_auto_refuses_a_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an old driver, or a torch for the CPU, would train on the CPU without a word."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("nvidiactl", "nvidia-uvm"):  # without a GPU of its own
        (tmp_path / name).touch()
    assert choose_device("auto", local_world(0, 1), {}, tmp_path).type == "cpu"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(UsageError, match=r"auto .*nvidia0.* cannot use it: .*; install .* --parallel.device=cpu"):
        choose_device("auto", local_world(0, 1), {}, tmp_path)
    for setting, environ in (("cpu", {}), ("auto", {"DS_ACCELERATOR": "cpu"}), ("auto", {"CUDA_VISIBLE_DEVICES": ""})):
        assert choose_device(setting, local_world(0, 1), environ, tmp_path).type == "cpu"


@pytest.mark.parametrize(("world_size", "is_bound"), [(1, False), (2, True)])
def test_only_several_ranks_are_bound_to_their_device(
    world_size: int, is_bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound, one rank would split a communicator of its own for each group (DeepSpeed#8248)."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **options: given.update(options))
    join_group(None, local_world(0, world_size), torch.device("cuda", 0), timedelta(seconds=1))
    assert given["backend"] == "cpu:gloo,cuda:nccl"
    assert ("device_id" in given) == is_bound


@pytest.mark.parametrize(
    ("setting", "world", "environ", "expected"),
    [
        ("auto", local_world(0, 2), {}, 4),
        ("auto", local_world(0, 16), {}, 1),
        ("auto", local_world(0, 2), {"OMP_NUM_THREADS": "1"}, 4),  # torchrun's default
        ("auto", local_world(0, 2), {"OMP_NUM_THREADS": "3"}, 3),
        ("auto", local_world(0, 1), {"OMP_NUM_THREADS": "1"}, 1),
        ("auto", local_world(0, 2, "mpirun"), {"OMP_NUM_THREADS": "1"}, 1),
        ("auto", local_world(0, 2, "srun"), {"SLURM_CPUS_PER_TASK": "6"}, 6),
        (5, local_world(0, 2, "mpirun"), {"OMP_NUM_THREADS": "1"}, 5),
    ],
)
def test_threads(
    setting: int | str, world: World, environ: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", numbers.append)
    monkeypatch.setattr("moe_train.distributed.bootstrap.usable_cores", lambda: 8)
    assert set_threads(setting, world, environ) == expected
    assert numbers == [expected]


def test_cores_obey_the_quotas_of_all_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    membership = tmp_path / "membership"
    membership.write_text("1:cpu,cpuacct:/\n0::/job/step\n")
    assert usable_cores(tmp_path, membership) == 8
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "job" / "cpu.max").write_text("350000 100000\n")
    assert usable_cores(tmp_path, membership) == 3
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert usable_cores(tmp_path, membership) == 1
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quotas(tmp_path, membership) == [3.5]


def test_free_port_can_be_used_and_nobody_answers_there() -> None:
    port = free_port()
    assert not accepts_connections("127.0.0.1", port)


def test_route_leads_over_the_interface_of_an_address() -> None:
    addresses = interface_addresses()
    assert not any(address.startswith("127.") for address in addresses.values())
    assert {name: route_interface(address) for name, address in addresses.items()} == {name: name for name in addresses}
    assert route_interface("127.0.0.1") is None
    assert route_interface("no-such-host.invalid") is None


def test_gloo_takes_the_route_to_rank_0_on_several_hosts_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_train.distributed.bootstrap.route_interface", lambda host: f"to-{host}")
    exported: dict[str, str] = {}
    export_world(discover_world(SLURM), environ=exported)
    assert (exported["GLOO_SOCKET_IFNAME"], exported["NCCL_SOCKET_IFNAME"]) == ("to-node08", "=to-node08")
    told = {"GLOO_SOCKET_IFNAME": "ib0"}
    export_world(discover_world(SLURM), environ=told)
    assert told["GLOO_SOCKET_IFNAME"] == "ib0"
    alone: dict[str, str] = {}
    export_world(discover_world({}), environ=alone)
    assert "GLOO_SOCKET_IFNAME" not in alone and "NCCL_SOCKET_IFNAME" not in alone


def test_discovery_needs_no_torch() -> None:
    code = (
        "import sys; from moe_train.distributed.bootstrap import discover_world; discover_world({});"
        "sys.exit(bool({'torch', 'mpi4py'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_a_local_rank_that_was_written_is_that_of_its_process_alone() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert discover_world(environ | {OWN_LOCAL_RANK: f"0 {os.getppid()}"}).local_rank == 1
    assert discover_world(environ | {OWN_LOCAL_RANK: "0"}).local_rank == 1
    assert discover_world(environ | {OWN_LOCAL_RANK: f"0 {os.getpid()}"}).local_rank == 0
