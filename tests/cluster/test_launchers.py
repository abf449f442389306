"""Every launcher on two hosts of two ranks each: the losses are those of four ranks on one host."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_train.parallel.addresses import free_port
from tests.cluster.hosts import VirtualCluster
from tests.cluster.training import ENVIRONMENT, PASSED, Training, need, run
from tests.processes import ProcessResult

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def environment_file(cluster: VirtualCluster) -> str:
    """What pdsh does not hand on, in deepspeed's own format."""
    path = cluster.folder / "deepspeed_env"
    path.write_text("".join(f"{name}={ENVIRONMENT[name]}\n" for name in PASSED))
    return str(path)


def on_both(cluster: VirtualCluster, *commands: list[str]) -> ProcessResult:
    """A command on each host at the same time; the result of the first that failed."""
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda pair: run(pair[0], *pair[1]), zip(cluster.hosts, commands)))
    return next((result for result in results if result.returncode), results[0])


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpirun", "torchrun"])
def test_launch(cluster: VirtualCluster, training: Training, launcher: str) -> None:
    if launcher == "pdsh":
        need("pdsh")
    run_dir = training.new_run()
    options = ["--hostfile", str(cluster.hostfile), "--launcher", launcher]
    result = run(cluster.hosts[0], "moe-train", "launch", *options, "--", *training.arguments(run_dir))
    training.check(result, run_dir)


def test_deepspeed_over_pdsh(cluster: VirtualCluster, training: Training) -> None:
    need("pdsh")
    run_dir = training.new_run()
    options = ["--hostfile", str(cluster.hostfile), "--master_port", str(free_port())]
    variables = {"DS_ENV_FILE": environment_file(cluster)}
    result = run(cluster.hosts[0], "deepspeed", *options, *training.arguments(run_dir), **variables)
    training.check(result, run_dir)


def test_deepspeed_over_openmpi(cluster: VirtualCluster, training: Training) -> None:
    run_dir = training.new_run()
    options = ["--hostfile", str(cluster.hostfile), "--launcher", "openmpi", "--launcher_args=--bind-to none"]
    variables = {"DS_ENV_FILE": environment_file(cluster)}
    result = run(cluster.hosts[0], "deepspeed", *options, *training.arguments(run_dir), **variables)
    training.check(result, run_dir)


def test_deepspeed_without_ssh(cluster: VirtualCluster, training: Training) -> None:
    run_dir = training.new_run()
    options = ["--hostfile", str(cluster.hostfile), "--no_ssh", "--master_addr", cluster.hosts[0].address]
    options += ["--master_port", str(free_port())]
    commands = [["deepspeed", *options, f"--node_rank={rank}", *training.arguments(run_dir)] for rank in range(2)]
    training.check(on_both(cluster, *commands), run_dir)


def test_open_mpi(cluster: VirtualCluster, training: Training) -> None:
    run_dir = training.new_run()
    passed = [word for name in PASSED for word in ("-x", name)]
    options = ["--host", "host1:2,host2:2", "-n", "4", "--bind-to", "none", *passed]
    result = run(cluster.hosts[0], "mpirun", *options, "python", *training.arguments(run_dir))
    training.check(result, run_dir)


def test_mpich(cluster: VirtualCluster, training: Training, tmp_path: Path) -> None:
    mpirun = need("mpirun.mpich")
    library = next((path for path in Path("/usr/lib").glob("*/libmpich.so.12")), None)
    if library is None:
        pytest.skip("no libmpich.so.12")
    (tmp_path / "libmpi.so.12").symlink_to(library)  # the name that mpi4py's wheel looks for
    variables = {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(tmp_path), "UCX_TLS": "tcp,self"}
    run_dir = training.new_run()
    options = ["-hosts", "host1:2,host2:2", "-n", "4"]  # hydra hands on the whole environment
    result = run(cluster.hosts[0], mpirun, *options, "python", *training.arguments(run_dir), **variables)
    training.check(result, run_dir)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun(cluster: VirtualCluster, training: Training, rendezvous: str) -> None:
    run_dir = training.new_run()
    address, port = cluster.hosts[0].address, free_port()
    commands = []
    for rank in range(2):
        options = ["--nnodes", "2", "--nproc-per-node", "2"]
        if rendezvous == "static":
            options += ["--node-rank", str(rank), "--master-addr", address, "--master-port", str(port)]
        else:
            options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}", "--rdzv-id", "test"]
        commands.append(["torchrun", *options, *training.arguments(run_dir)])
    training.check(on_both(cluster, *commands), run_dir)
