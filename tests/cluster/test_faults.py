"""A link cut, a rank killed, a host without power in mid-run: it is named, all ends, a run goes on from its save."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, VirtualCluster
from tests.cluster.training import ENVIRONMENT, Training, need, run
from tests.train.runs import ROOT, losses, records

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("idle")]
STEPS = 400  # more than fit into the time until the fault
NOTICE_SECONDS = 30.0
LONG = (f"--train.steps={STEPS}", "--checkpoint.every=5")


class Running:
    """A command on a host, with its output in a file."""

    def __init__(self, host: Host, output: Path, *args: str) -> None:
        self.output, self.args = output, args
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [*host.prefix, *args],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **ENVIRONMENT},
                cwd=ROOT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Until so many steps are on record, and a checkpoint is there."""
        self.wait_until(lambda: _last_step(run_dir) >= step and (run_dir / "checkpoints" / "latest").exists(), 60)

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


def end_by_kill(cluster: VirtualCluster) -> None:
    os.kill(rank_pids(cluster.hosts[1])[0], signal.SIGKILL)


def end_by_cut(cluster: VirtualCluster) -> None:
    cluster.hosts[1].cut()


def end_by_power(cluster: VirtualCluster) -> None:
    cluster.hosts[1].power_off()


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
    fault: Callable[[VirtualCluster], None],
) -> None:
    if launcher == "pdsh":
        need("pdsh")
    run_dir = training.new_run()
    command = Running(cluster.hosts[0], tmp_path / "out.txt", *launch(cluster, training, launcher, run_dir))
    running.append(command)
    command.wait_for_step(run_dir, 8)
    fault(cluster)
    named = command.wait_until(
        lambda: re.search(r"rank [0-3] (has given no|is gone|lost|has ended)", command.text()) is not None,
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


def test_signal_is_an_orderly_stop(
    cluster: VirtualCluster, training: Training, tmp_path: Path, running: list[Running]
) -> None:
    run_dir = training.new_run()
    command = Running(cluster.hosts[0], tmp_path / "out.txt", *launch(cluster, training, "torchrun", run_dir))
    running.append(command)
    command.wait_for_step(run_dir, 6)
    for pid, line in cluster.hosts[0].processes().items():
        if re.match(r"\S*python\S* \S*moe-train launch --hostfile", line):  # nsenter would hand nothing on
            os.kill(pid, signal.SIGTERM)
    command.wait_until(lambda: command.process.poll() is not None, 30)
    assert command.process.returncode == 75, command.text()
    assert "SIGTERM: the ranks finish their step and save" in command.text()
    assert cluster.wait_until_idle(20) == {}
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{records(run_dir)[-1]['step']:08d}\n"


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
