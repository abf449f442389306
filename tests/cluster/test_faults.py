"""A link cut, a rank killed, a host without power in mid-run: it is named, all ends, a run goes on from its save."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import ClusterUnavailable, Host, VirtualCluster, virtual_cluster
from tests.cluster.training import ENVIRONMENT, Training, mpich, need, prepare, run
from tests.train.runs import ROOT, losses, records

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("idle")]
STEPS = 400  # more than fit into the time until the fault
NOTICE_SECONDS = 30.0
LONG = (f"--train.steps={STEPS}", "--checkpoint.every=5")


class Running:
    """A command on a host, with its output in a file."""

    def __init__(self, host: Host, output: Path, *args: str, **variables: str) -> None:
        self.output, self.args = output, args
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [*host.prefix, *args],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **ENVIRONMENT, **variables},
                cwd=ROOT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Until so many steps are on record, and a checkpoint is there."""
        self.wait_until(lambda: _last_step(run_dir) >= step and (run_dir / "checkpoints" / "latest").exists(), 180)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> float:
        """Until something holds; the seconds that it took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, self.text()[-6000:]
            time.sleep(0.1)
        return time.monotonic() - started


def _last_step(run_dir: Path) -> int:
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return len([line for line in lines if line.endswith("}")])


def launch(cluster: VirtualCluster, training: Training, launcher: str, run_dir: Path, *options: str) -> list[str]:
    command = ["moe-train", "launch", "--hostfile", str(cluster.hostfile), "--launcher", launcher, *options, "--"]
    return [*command, *training.arguments(run_dir, *LONG)]


def rank_pids(host: Host) -> list[int]:
    """Of the ranks on a host, without processes that they have started."""
    own = [pid for pid, line in host.processes().items() if re.match(r"\S*python\S* (-u )?launch/train.py", line)]
    return sorted(own)


def end_by_kill(cluster: VirtualCluster) -> str:
    pid = rank_pids(cluster.hosts[1])[0]
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    os.kill(pid, signal.SIGKILL)
    return next(word for word in words if word.startswith(b"RANK="))[5:].decode()


def end_by_cut(cluster: VirtualCluster) -> str:
    cluster.hosts[1].cut()
    return "[23]"


def end_by_power(cluster: VirtualCluster) -> str:
    cluster.hosts[1].power_off()
    return "[23]"


@pytest.fixture
def running(cluster: VirtualCluster) -> Iterator[list[Running]]:
    """Commands to be gone at the end of the test."""
    started: list[Running] = []
    yield started
    cluster.mend()
    for command in started:
        command.process.kill()
        command.process.wait(10)


@pytest.mark.parametrize(
    ("launcher", "fault"),
    [
        pytest.param("pdsh", end_by_cut, id="cut-pdsh"),
        pytest.param("mpirun", end_by_cut, id="cut-mpirun"),
        pytest.param("torchrun", end_by_cut, id="cut-torchrun"),
        pytest.param("pdsh", end_by_power, id="power-pdsh"),
        pytest.param("torchrun", end_by_kill, id="kill-torchrun"),
    ],
)
def test_fault(
    cluster: VirtualCluster,
    training: Training,
    tmp_path: Path,
    running: list[Running],
    launcher: str,
    fault: Callable[[VirtualCluster], str],
) -> None:
    """A fault gives a pattern of the ranks that it hits: no other may be named."""
    need({"pdsh": "pdsh", "torchrun": "torchrun"}.get(launcher, "mpirun"))
    run_dir = training.new_run()
    command = Running(cluster.hosts[0], tmp_path / "out.txt", *launch(cluster, training, launcher, run_dir))
    running.append(command)
    command.wait_for_step(run_dir, 8)
    ranks = fault(cluster)
    named = command.wait_until(
        lambda: re.search(rf"rank {ranks} (has given no|is gone|lost|has ended)", command.text()) is not None,
        NOTICE_SECONDS,
    )
    ended = named + command.wait_until(lambda: command.process.poll() is not None, 15)
    print(f"{launcher}, {fault.__name__}: named after {named:.1f} s, ended after {ended:.1f} s")
    assert command.process.returncode not in (0, 2, 75), command.text()
    # A host that is cut off ends its ranks by itself.
    assert cluster.wait_until_idle(NOTICE_SECONDS + 10 - min(ended, 30)) == {}
    cluster.mend()
    saved = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    before = {step: loss for step, loss in losses(run_dir).items() if step <= saved}
    last = saved + 3
    again = run(
        cluster.hosts[0], "torchrun", "--nproc-per-node", "4", *training.arguments(run_dir, f"--train.steps={last}")
    )
    assert again.returncode == 0, again
    whole = training.new_run()
    never = run(
        cluster.hosts[0], "torchrun", "--nproc-per-node", "4", *training.arguments(whole, f"--train.steps={last}")
    )
    assert never.returncode == 0, never
    assert losses(run_dir) == losses(whole)
    assert before.items() <= losses(whole).items()


@pytest.mark.parametrize("launcher", ["torchrun", "pdsh", "openmpi", "mpirun", "mpich"])
def test_signal_is_an_orderly_stop(
    cluster: VirtualCluster, training: Training, tmp_path: Path, running: list[Running], launcher: str
) -> None:
    command, run_dir = start_with(launcher, cluster, training, tmp_path)
    running.append(command)
    command.wait_for_step(run_dir, 6)
    send(cluster.hosts[0], signal.SIGTERM)
    command.wait_until(lambda: command.process.poll() is not None, 30)
    assert command.process.returncode == 75, command.text()
    assert "SIGTERM: the ranks finish their step and save" in command.text()
    assert cluster.wait_until_idle(20) == {}
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{records(run_dir)[-1]['step']:08d}\n"


@pytest.mark.parametrize(
    ("launcher", "host"), [("torchrun", 1), ("pdsh", 1), ("openmpi", 1), ("mpirun", 1), ("mpich", 0), ("mpich", 1)]
)
def test_a_failed_rank_is_never_a_success(
    cluster: VirtualCluster, training: Training, tmp_path: Path, running: list[Running], launcher: str, host: int
) -> None:
    command, run_dir = start_with(launcher, cluster, training, tmp_path)
    running.append(command)
    command.wait_for_step(run_dir, 6)
    os.kill(rank_pids(cluster.hosts[host])[1], signal.SIGKILL)
    command.wait_until(lambda: command.process.poll() is not None, 60)
    print(f"{launcher}: exit code {command.process.returncode}")
    assert command.process.returncode not in (0, 2, 75), command.text()
    assert cluster.wait_until_idle(20) == {}
    # The two ranks of a host have process ids in any order.
    who_why_which = (
        rf"rank [{2 * host}{2 * host + 1}] \(pid \d+ on host{host + 1}\) .*signal 9 .*last checkpoint: step \d+"
    )
    assert re.search(who_why_which, command.text()), command.text()


@pytest.mark.parametrize("moment", ["at the start", "as the ranks start", "in training"])
def test_a_killed_launch_leaves_nothing(
    cluster: VirtualCluster, training: Training, tmp_path: Path, running: list[Running], moment: str
) -> None:
    command, run_dir = start_with("torchrun", cluster, training, tmp_path)
    running.append(command)
    if moment == "in training":
        command.wait_for_step(run_dir, 6)
    else:
        starts = moment == "at the start"
        command.wait_until(lambda: bool(cluster.hosts[1].processes() if starts else rank_pids(cluster.hosts[1])), 180)
    send(cluster.hosts[0], signal.SIGKILL)
    assert cluster.wait_until_idle(NOTICE_SECONDS) == {}
    last = max(losses(run_dir), default=0) + 2 if (run_dir / "metrics.jsonl").exists() else 2
    again = run(
        cluster.hosts[0], "torchrun", "--nproc-per-node", "4", *training.arguments(run_dir, f"--train.steps={last}")
    )
    assert again.returncode == 0, again
    assert set(losses(run_dir)) == set(range(1, last + 1))


def start_with(launcher: str, cluster: VirtualCluster, training: Training, folder: Path) -> tuple[Running, Path]:
    """A long training by `moe-train launch` with a launcher below it, and its run folder."""
    variables, options = _launcher(launcher, folder)
    run_dir = training.new_run()
    words = launch(cluster, training, "mpirun" if launcher == "mpich" else launcher, run_dir, *options)
    return Running(cluster.hosts[0], folder / "out.txt", *words, **variables), run_dir


def _launcher(name: str, folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Variables and options to have a launcher; skips the test where it is not installed."""
    if name == "mpich":
        (folder / "mpich").mkdir()
        return mpich(folder / "mpich"), ("--env", "UCX_TLS")
    need({"pdsh": "pdsh", "torchrun": "torchrun"}.get(name, "mpirun"))
    return {}, ()


def send(host: Host, number: int) -> None:
    """A signal to `moe-train launch` on a host: nsenter, which started it, would hand nothing on."""
    for pid, line in host.processes().items():
        if re.match(r"\S*python\S* \S*moe-train launch --hostfile", line):
            os.kill(pid, number)


def test_goes_on_without_the_first_of_three_hosts(tmp_path: Path) -> None:
    need("torchrun")
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(virtual_cluster(num_hosts=3, slots=1))
        except ClusterUnavailable as error:
            pytest.skip(str(error))
        training = prepare(cluster)
        cluster.hosts[0].power_off()
        run_dir = training.new_run()
        options = ["--hostfile", str(cluster.hostfile), "--launcher", "torchrun", "--allow-fewer-hosts"]
        more = ["--parallel.expert_parallel_size=2", "--train.steps=2"]
        result = run(cluster.hosts[1], "moe-train", "launch", *options, "--", *training.arguments(run_dir, *more))
        assert result.returncode == 0, result
        assert "host1 cannot be reached over ssh" in result.stderr and "2 x cpu" in result.stdout + result.stderr
        assert set(losses(run_dir)) == {1, 2}


def test_goes_on_with_the_hosts_that_are_left(
    cluster: VirtualCluster, training: Training, tmp_path: Path, running: list[Running]
) -> None:
    run_dir = training.new_run()
    words = launch(cluster, training, "torchrun", run_dir, "--allow-fewer-hosts")
    words += ["--train.steps=60", "--parallel.expert_parallel_size=2"]
    command = Running(cluster.hosts[0], tmp_path / "out.txt", "launch/keep_running.sh", "--wait", "0", "--", *words)
    running.append(command)
    command.wait_for_step(run_dir, 8)
    cluster.hosts[1].power_off()
    command.wait_until(lambda: command.process.poll() is not None, 120)
    text = command.text()
    assert command.process.returncode == 0, text
    assert "restart 1 of 3" in text and "warning" in text and "going on without it" in text, text
    assert "2 x cpu" in text, text
    assert set(losses(run_dir)) == set(range(1, 61))
    assert cluster.wait_until_idle(10) == {}
