"""A small script under every launcher, with real processes: the ranks find each other and agree."""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moe_train.distributed.addresses import free_port
from tests.processes import ProcessResult, run_process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("print_world.py")
TIMEOUT = 60  # seconds a launch; the slowest, deepspeed, took 11 on two cores
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(*args: str | Path, timeout: float = TIMEOUT, **variables: str) -> ProcessResult:
    """Runs a command in an environment without a launcher's variables, but those given."""
    prefixes = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_")
    launched = [name for name in os.environ if name in LAUNCHER_VARIABLES or name.startswith(prefixes)]
    cleared = [name for name in launched if name != "SLURM_CONF"]  # which says where the cluster is
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = dict.fromkeys(cleared) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path} | variables
    return run_process(args, timeout, env=env, cwd=ROOT)


def records(*results: ProcessResult) -> list[dict[str, Any]]:
    """What the ranks printed, in the order of ranks."""
    for result in results:
        assert result.returncode == 0, result
    lines = [line for result in results for line in result.stdout.splitlines() if line.startswith("{")]
    return sorted((json.loads(line) for line in lines), key=lambda record: record["world"]["rank"])


def check(ranks: list[dict[str, Any]], launcher: str, size: int) -> None:
    """Holds what the ranks printed against a world of `size` ranks on this host."""
    assert [record["world"]["rank"] for record in ranks] == list(range(size))
    masters = {(record["world"]["master_addr"], record["world"]["master_port"]) for record in ranks}
    assert len(masters) == 1
    for rank, record in enumerate(ranks):
        world = record["world"]
        assert (world["world_size"], world["local_rank"], world["local_world_size"]) == (size, rank, size)
        assert (world["num_nodes"], world["node_rank"], world["launcher"]) == (1, 0, launcher)
        assert record["found_again"] == world
        assert record["sum"] == size * (size + 1) // 2
        assert record["backend"] == "gloo"
        assert not record["torch_was_needed"]
        exported = record["exported"]
        assert (exported["RANK"], exported["WORLD_SIZE"], exported["LOCAL_RANK"]) == (str(rank), str(size), str(rank))
        assert (exported["MASTER_ADDR"], int(exported["MASTER_PORT"])) in masters
        assert exported["DS_ACCELERATOR"] == "cpu"


def launcher_path(name: str) -> Path:
    """A command of this environment, or of the system."""
    beside = Path(sys.executable).with_name(name)
    found = beside if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither in {beside.parent} nor on PATH")
    return Path(found)


def mpirun(*args: str) -> ProcessResult:
    """Two ranks under Open MPI, also for root and on one core."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: discovery under mpirun needs it")
    options = ["-n", "2", "--oversubscribe", "--bind-to", "none"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return launch(launcher_path("mpirun"), *options, sys.executable, SCRIPT, *args, **root)


def test_plain_python() -> None:
    check(records(launch(sys.executable, SCRIPT)), "single", 1)


def test_torchrun() -> None:
    result = launch(launcher_path("torchrun"), "--nproc-per-node", "2", SCRIPT)
    check(records(result), "torchrun", 2)


def test_mpirun() -> None:
    check(records(mpirun()), "mpirun", 2)


def test_mpirun_ends_when_a_rank_fails() -> None:
    result = mpirun("fail-1")  # rank 0 waits for rank 1, 30 s in the rendezvous, unless mpirun ends it
    assert result.returncode == 3, result
    assert result.seconds < 25, result


def test_mpi_of_another_kind_is_refused() -> None:
    pytest.importorskip("mpi4py")
    launcher_path("mpirun")  # mpi4py finds the library beside it
    result = launch(sys.executable, SCRIPT, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0")
    assert result.returncode == 2, result
    assert "rank 0 of 1" in result.stderr
    assert "OMPI_COMM_WORLD_SIZE (2)" in result.stderr
    assert "MPI4PY_MPIABI=mpich" in result.stderr


def test_deepspeed() -> None:
    options = ["--num_gpus", "2", "--master_port", str(free_port())]
    result = launch(launcher_path("deepspeed"), *options, SCRIPT, DS_ACCELERATOR="cpu")
    check(records(result), "deepspeed", 2)


def slurm_task(rank: int, job_id: int, **variables: str) -> ProcessResult:
    """One of two processes with the variables that srun would set."""
    slurm = {
        "SLURM_JOB_ID": str(job_id),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    return launch(sys.executable, SCRIPT, **slurm, **variables)


def test_variables_of_srun() -> None:
    job_id = os.getpid()  # the port is derived from it
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda rank: slurm_task(rank, job_id), range(2)))
    check(records(*results), "srun", 2)


def test_world_of_one_in_a_step_of_two_tasks_is_refused() -> None:
    result = slurm_task(0, 1, RANK="0", WORLD_SIZE="1")
    assert result.returncode == 2, result
    assert "WORLD_SIZE (1) contradicts SLURM_NTASKS (2)" in result.stderr


def test_srun() -> None:
    srun = shutil.which("srun")
    if srun is None or shutil.which("sinfo") is None:
        pytest.skip("Slurm is not installed: no srun and sinfo on PATH")
    if run_process(["sinfo", "--noheader", "--states=idle"], timeout=20).stdout.strip() == "":
        pytest.skip("Slurm is installed, but no node is idle")
    result = launch(srun, "--ntasks=2", "--nodes=1", "--overcommit", sys.executable, SCRIPT)
    check(records(result), "srun", 2)
