"""Every launcher on two hosts of two ranks each: the losses are those of four ranks on one host."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_train.distributed.addresses import free_port
from tests.cluster.hosts import VirtualCluster
from tests.cluster.training import Training, mpich, need, run
from tests.processes import ProcessResult

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


SAY = """
import os, pathlib, socket
rank = os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
pathlib.Path(__file__).with_name("rank" + rank).write_text(socket.gethostname() + chr(10) + os.environ["MINE"])
"""


def on_both(cluster: VirtualCluster, *command: str, **variables: str) -> ProcessResult:
    """A command on each host at the same time, with NODE_RANK; the result of the first that failed."""

    def start(rank: int) -> ProcessResult:
        return run(cluster.hosts[rank], *command, NODE_RANK=str(rank), **variables)

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(start, range(2)))
    return next((result for result in results if result.returncode), results[0])


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpirun", "torchrun"])
def test_launch(cluster: VirtualCluster, training: Training, launcher: str) -> None:
    need({"pdsh": "pdsh", "torchrun": "torchrun"}.get(launcher, "mpirun"))
    run_dir = training.new_run()
    options = ["--hostfile", str(cluster.hostfile), "--launcher", launcher]
    result = run(cluster.hosts[0], "moe-train", "launch", *options, "--", *training.arguments(run_dir))
    training.check(result, run_dir)


@pytest.mark.parametrize(("way", "command"), [("pdsh", "pdsh"), ("openmpi", "mpirun")])
def test_deepspeed(cluster: VirtualCluster, training: Training, way: str, command: str) -> None:
    need(command)
    run_dir = training.new_run()
    arguments = [way, str(cluster.hostfile), *training.arguments(run_dir)[1:]]
    result = run(cluster.hosts[0], "launch/deepspeed.sh", *arguments, MASTER_PORT=str(free_port()))
    training.check(result, run_dir)


def test_deepspeed_without_ssh(cluster: VirtualCluster, training: Training) -> None:
    run_dir = training.new_run()
    arguments = ["no-ssh", str(cluster.hostfile), *training.arguments(run_dir)[1:]]
    variables = {"MASTER_ADDR": cluster.hosts[0].address, "MASTER_PORT": str(free_port())}
    training.check(on_both(cluster, "launch/deepspeed.sh", *arguments, **variables), run_dir)


def test_open_mpi(cluster: VirtualCluster, training: Training) -> None:
    need("mpirun")
    run_dir = training.new_run()
    arguments = ["launch/mpirun.sh", "4", *training.arguments(run_dir)[1:]]
    training.check(run(cluster.hosts[0], *arguments, HOSTS="host1:2,host2:2"), run_dir)


def test_mpich(cluster: VirtualCluster, training: Training, tmp_path: Path) -> None:
    variables = mpich(tmp_path)
    run_dir = training.new_run()
    arguments = ["launch/mpirun.sh", "4", *training.arguments(run_dir)[1:]]
    training.check(run(cluster.hosts[0], *arguments, HOSTS="host1:2,host2:2", **variables), run_dir)


def test_launch_over_mpich(cluster: VirtualCluster, training: Training, tmp_path: Path) -> None:
    variables = mpich(tmp_path)
    run_dir = training.new_run()
    options = ["--hostfile", str(cluster.hostfile), "--launcher", "mpirun", "--env", "UCX_TLS"]
    arguments = ["moe-train", "launch", *options, "--", *training.arguments(run_dir)]
    training.check(run(cluster.hosts[0], *arguments, **variables), run_dir)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun(cluster: VirtualCluster, training: Training, rendezvous: str) -> None:
    run_dir = training.new_run()
    arguments = [rendezvous, *training.arguments(run_dir)[1:]]
    variables = {"MASTER_ADDR": cluster.hosts[0].address, "MASTER_PORT": str(free_port()), "RANKS": "2"}
    training.check(on_both(cluster, "launch/torchrun.sh", *arguments, **variables), run_dir)


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpirun", "torchrun", "mpich"])
def test_doctor(cluster: VirtualCluster, training: Training, tmp_path: Path, launcher: str) -> None:
    if launcher == "mpich":
        below, variables, more = "mpirun", mpich(tmp_path), ["--env", "UCX_TLS"]
    else:
        need({"pdsh": "pdsh", "torchrun": "torchrun"}.get(launcher, "mpirun"))
        below, variables, more = launcher, {}, []
    output = cluster.folder / f"machine_{launcher}.json"
    options = ["--hostfile", str(cluster.hostfile), "--launcher", below, *more]
    asked = ["--quick", "--sizes=1K,64K", "--output", str(output), *training.arguments(training.new_run())[1:]]
    result = run(cluster.hosts[0], "moe-train", "launch", *options, "--", "moe-train", "doctor", *asked, **variables)
    assert result.returncode == 0, result
    report = json.loads(output.read_text())
    assert report["passed"] and report["problems"] == []
    assert [rank["host"] for rank in report["ranks"]] == ["host1", "host1", "host2", "host2"]
    assert {each["scope"] for each in report["collectives"]} == {"within", "across", "all"}
    assert report["machine"]["intra_node"] and report["machine"]["inter_node"]
    assert cluster.wait_until_idle(10) == {}


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpirun", "torchrun"])
def test_places_and_values_are_what_was_given(cluster: VirtualCluster, tmp_path: Path, launcher: str) -> None:
    """Ranks follow the lines of the hostfile, here not the order of the hosts' names; values arrive as they are."""
    need({"pdsh": "pdsh", "torchrun": "torchrun"}.get(launcher, "mpirun"))
    hostfile, script = tmp_path / "hostfile", tmp_path / "say.py"
    hostfile.write_text("host2 slots=2\nhost1 slots=2\n")
    script.write_text(SAY)
    value = """a b $HOME `id` "c" 'd' \\ %h ^e;"""
    options = ["--hostfile", str(hostfile), "--launcher", launcher, "--env", f"MINE={value}"]
    result = run(cluster.hosts[0], "moe-train", "launch", *options, "--", str(script))
    assert result.returncode == 0, result
    said = {path.name: path.read_text().split("\n") for path in tmp_path.glob("rank*")}
    hosts = ["host2", "host2", "host1", "host1"]
    assert said == {f"rank{rank}": [host, value] for rank, host in enumerate(hosts)}, result
