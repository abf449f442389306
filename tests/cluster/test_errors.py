"""What can be wrong with a cluster: one message, exit code 2, and nothing left on any host."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, VirtualCluster
from tests.cluster.training import BIN, Training, need, run
from tests.processes import ProcessResult
from tests.train.runs import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("idle")]
PORT = 29555


def launch(cluster: VirtualCluster, training: Training, *options: str, more: tuple[str, ...] = ()) -> ProcessResult:
    """By torchrun, which needs ssh alone; the checks come before any launcher."""
    words = ["--launcher", "torchrun", *options]
    if "--hostfile" not in options:
        words += ["--hostfile", str(cluster.hostfile)]
    arguments = training.arguments(training.new_run(), *more)
    return run(cluster.hosts[0], "moe-train", "launch", *words, "--", *arguments)


def check(result: ProcessResult, cluster: VirtualCluster, *parts: str) -> None:
    """One line with all the parts, exit code 2, an idle cluster."""
    assert result.returncode == 2, result
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("moe-train launch: "), result
    assert [part for part in parts if part not in lines[0]] == [], result
    assert result.stdout == "", result
    assert cluster.wait_until_idle(10) == {}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(None, ["cannot be read", "No such file"], id="missing"),
        pytest.param("# nobody\n", ["names no host"], id="empty"),
        pytest.param("host1 slots=2\nhost2 2\n", ["line 2", "'host2 2'", "slots=N"], id="malformed"),
        pytest.param("host1 slots=two\n", ["line 1", "slots ('two')"], id="slots"),
        pytest.param("host1 slots=2\n\nhost1 slots=2\n", ["line 3", "host1 stands in line 1 already"], id="twice"),
        pytest.param("host1 slots=2\nhost9 slots=2\n", ["line 2: host9", "Could not resolve"], id="unknown name"),
    ],
)
def test_wrong_hostfile(
    cluster: VirtualCluster, training: Training, tmp_path: Path, text: str | None, parts: list[str]
) -> None:
    hostfile = tmp_path / "hosts.txt"
    if text is not None:
        hostfile.write_text(text)
    check(launch(cluster, training, "--hostfile", str(hostfile)), cluster, f"--hostfile {hostfile}", *parts)


def test_host_down(cluster: VirtualCluster, training: Training) -> None:
    cluster.hosts[1].power_off()
    result = launch(cluster, training)
    check(result, cluster, "line 2: host2 cannot be reached over ssh: ssh: connect to host host2")
    assert result.seconds < 30, result


def test_ssh_refused(cluster: VirtualCluster, training: Training) -> None:
    cluster.hosts[1].stop_server()
    try:
        check(launch(cluster, training), cluster, "host2 cannot be reached over ssh", "Connection refused")
    finally:
        cluster.hosts[1].power_off()


@pytest.mark.parametrize(
    ("name", "said"), [("authorized_keys", "Permission denied"), ("known_hosts", "Host key verification failed")]
)
def test_ssh_not_allowed(cluster: VirtualCluster, training: Training, name: str, said: str) -> None:
    # host1's list of known hosts, and host2's of keys that may come in.
    folder = cluster.hosts[0 if name == "known_hosts" else 1].folder / "ssh"
    kept = (folder / name).read_text()
    lines = [line for line in kept.splitlines() if name == "known_hosts" and "host2" not in line]
    (folder / name).write_text("\n".join(lines))
    try:
        check(launch(cluster, training), cluster, "host2 cannot be reached over ssh", said)
    finally:
        (folder / name).write_text(kept)


def test_port_taken(cluster: VirtualCluster, training: Training) -> None:
    with listener(cluster.hosts[0], PORT):
        result = launch(cluster, training, "--master-port", str(PORT))
    check(result, cluster, f"--master-port ({PORT})", "taken on host1")


def test_port_taken_under_a_plain_launcher(cluster: VirtualCluster, training: Training) -> None:
    need("mpirun")
    arguments = ["python", *training.arguments(training.new_run())]
    options = ["--host", "host1:2,host2:2", "-n", "4", "--bind-to", "none"]
    passed = [word for name in ("PATH", "DS_ACCELERATOR", "MASTER_ADDR", "MASTER_PORT") for word in ("-x", name)]
    variables = {"MASTER_ADDR": cluster.hosts[0].address, "MASTER_PORT": str(PORT)}
    with listener(cluster.hosts[0], PORT):
        result = run(cluster.hosts[0], "mpirun", *options, *passed, *arguments, **variables)
    assert result.returncode == 2, result
    assert result.stderr.count("train.py: ") == 1, result
    assert f"train.py: MASTER_PORT ({PORT}): rank 0 cannot listen there" in result.stderr, result
    assert result.seconds < 60, result


def test_missing_script(cluster: VirtualCluster) -> None:
    options = ["--hostfile", str(cluster.hostfile), "--launcher", "torchrun"]
    result = run(cluster.hosts[0], "moe-train", "launch", *options, "--", "launch/trian.py")
    check(result, cluster, "host1 lacks the script launch/trian.py", "host2 lacks the script")


@pytest.fixture
def other_version(cluster: VirtualCluster, tmp_path: Path) -> Iterator[str]:
    """host2 has another version of the package, until it is started again."""
    version = ROOT / "moe_train" / "config" / "version.py"
    (tmp_path / "version.py").write_text('VERSION = "0.0.9"\n')
    assert cluster.hosts[1].run("mount", "--bind", tmp_path / "version.py", version, timeout=10).returncode == 0
    yield "0.0.9"
    cluster.hosts[1].power_off()


def test_mixed_versions(cluster: VirtualCluster, training: Training, other_version: str) -> None:
    differs = "the version of moe_train differs between hosts"
    check(launch(cluster, training), cluster, differs, "0.1.0 on host1", f"{other_version} on host2")


def test_mixed_versions_under_a_plain_launcher(cluster: VirtualCluster, training: Training, other_version: str) -> None:
    need("mpirun")
    options = ["--host", "host1:1,host2:1", "-n", "2", "--bind-to", "none", "-x", "PATH", "-x", "DS_ACCELERATOR"]
    arguments = training.arguments(training.new_run(), "--parallel.expert_parallel_size=2")
    result = run(cluster.hosts[0], "mpirun", *options, "python", *arguments)
    assert result.returncode == 2, result
    assert result.stderr.count("train.py: ") == 1, result
    assert (
        f"the version of moe_train differs between ranks: 0.1.0 on rank 0, {other_version} on rank 1" in result.stderr
    )
    assert cluster.wait_until_idle(10) == {}


def test_missing_folder_and_interpreter(cluster: VirtualCluster, training: Training, tmp_path: Path) -> None:
    host = cluster.hosts[1]
    assert host.run("mount", "-t", "tmpfs", "tmpfs", BIN, timeout=10).returncode == 0
    try:
        check(launch(cluster, training), cluster, f"host2 has no interpreter {BIN}")
        assert host.run("mount", "-t", "tmpfs", "tmpfs", ROOT.parent, timeout=10, cwd=tmp_path).returncode == 0
        check(launch(cluster, training), cluster, f"host2 has no folder {ROOT}")
    finally:
        host.power_off()


@pytest.mark.parametrize("launcher", ["pdsh", "torchrun"])
def test_expert_parallel_size_that_does_not_divide(cluster: VirtualCluster, training: Training, launcher: str) -> None:
    need(launcher)
    more = ("--parallel.expert_parallel_size=3",)
    result = launch(cluster, training, "--launcher", launcher, more=more)
    assert result.returncode == 2, result
    text = result.stdout + result.stderr
    assert text.count("train.py: ") == 1 and "expert_parallel_size (3)" in text, result
    assert cluster.wait_until_idle(10) == {}


@contextlib.contextmanager
def listener(host: Host, port: int) -> Iterator[None]:
    """Something else listens on a port of a host."""
    code = f"import socket, time; s = socket.create_server(('', {port})); print('ready', flush=True); time.sleep(300)"
    with subprocess.Popen([*host.prefix, str(BIN / "python"), "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            for pid, line in host.processes().items():
                if "create_server" in line:
                    os.kill(pid, signal.SIGKILL)
            process.kill()
