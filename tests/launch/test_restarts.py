"""Runs whose ranks are killed or stopped under real launchers: what starts them again, and that no number differs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.processes import MARKER, ProcessResult, end_processes, marked_processes, run_process
from tests.train.runs import CPU, ROOT, SMALL, free_port, losses, records, start_forked, train_forked

KEEP_RUNNING = str(ROOT / "launch" / "keep_running.sh")
BIN = Path(sys.executable).parent
STEPS = 60
RUN = (*SMALL, f"--train.steps={STEPS}", "--checkpoint.every=3")
TIMEOUT = 200  # seconds; two starts of a launcher with two ranks take 45 on two busy cores


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The records by step of a run of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = train_forked(2, *RUN, f"--train.run_dir={folder}")
    assert result.returncode == 0, result
    return {record["step"]: record for record in records(folder)}


class Launched:
    """A command that runs while the test does something to it."""

    def __init__(self, args: Sequence[str], output: Path) -> None:
        self.marker, self.output, self.args = uuid.uuid4().hex, output, list(args)
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        self.started = time.monotonic()
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                self.args,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **CPU, "PATH": path, MARKER: self.marker},
                cwd=ROOT,
                start_new_session=True,
            )

    def ranks(self) -> list[int]:
        """Pids of the ranks that live, by rank; not of their sentinels, which inherit the variables."""
        found = {}
        for pid in marked_processes(self.marker):
            with contextlib.suppress(OSError, StopIteration):
                if b"launch/train.py" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    continue
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found[int(next(word for word in words if word.startswith(b"RANK="))[5:])] = pid
        return [found[rank] for rank in sorted(found)]

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Until metrics.jsonl has the step and a checkpoint is there."""
        wait_for_step(run_dir, step, lambda: self.process.poll() is None, self.text)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def end(self) -> ProcessResult:
        """Waits for it to end by itself, ranks and all."""
        code = self.process.wait(TIMEOUT)
        return ProcessResult(self.args, code, self.text(), "", time.monotonic() - self.started)


def wait_for_step(run_dir: Path, step: int, is_alive: Callable[[], bool], describe: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        written = (run_dir / "metrics.jsonl").exists() and records(run_dir)
        if written and written[-1]["step"] >= step and (run_dir / "checkpoints" / "latest").exists():
            return
        assert is_alive() and time.monotonic() < deadline, describe()
        time.sleep(0.005)


@contextlib.contextmanager
def launched(tmp_path: Path, *args: str) -> Iterator[Launched]:
    """The command; nothing of it outlives the block."""
    command = Launched(args, tmp_path / "output.txt")
    try:
        yield command
    finally:
        end_processes(command.process.pid, command.marker)
        command.process.wait(10)


def deepspeed() -> list[str]:
    port = str(free_port())
    return [str(BIN / "deepspeed"), "--log_level", "error", "--num_gpus", "2", "--master_port", port, "launch/train.py"]


def keep_running(*options: str) -> list[str]:
    return [KEEP_RUNNING, "--wait", "0", *options, "--"]


@pytest.mark.slow
def test_torchrun_starts_again_after_a_killed_rank(tmp_path: Path, uninterrupted: dict[int, Any]) -> None:
    run_dir = tmp_path / "run"
    launcher = [str(BIN / "torchrun"), "--standalone", "--max-restarts=2", "--nproc-per-node=2", "launch/train.py"]
    with launched(tmp_path, *launcher, *RUN, f"--train.run_dir={run_dir}") as command:
        command.wait_for_step(run_dir, 5)
        os.kill(command.ranks()[1], signal.SIGKILL)
        result = command.end()
        assert result.returncode == 0, result
    assert losses(run_dir) == {
        step: record["train/loss"] for step, record in uninterrupted.items()
    }  # to the last bit: the same layout, and fp32 sums in the same order


@pytest.mark.slow
def test_keep_running_starts_deepspeed_again_after_killed_ranks(tmp_path: Path, uninterrupted: dict[int, Any]) -> None:
    run_dir = tmp_path / "run"
    with launched(tmp_path, *keep_running(), *deepspeed(), *RUN, f"--train.run_dir={run_dir}") as command:
        command.wait_for_step(run_dir, 5)
        for pid in command.ranks():
            os.kill(pid, signal.SIGKILL)
        result = command.end()
        assert result.returncode == 0, result
        assert "exit code 247: restart 1 of 3" in result.stdout, result
        assert not marked_processes(command.marker)
    assert losses(run_dir) == {step: record["train/loss"] for step, record in uninterrupted.items()}


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param((), id="global batch of the checkpoint"),
        pytest.param(("--train.micro_batch_size=auto", "--train.global_batch_size=4"), id="micro batch of both ranks"),
    ],
)
def test_a_killed_run_goes_on_with_fewer_ranks(
    tmp_path: Path, uninterrupted: dict[int, Any], batch: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    ranks = start_forked(2, *RUN, f"--train.run_dir={run_dir}")
    try:
        wait_for_step(run_dir, 5, lambda: ranks[0].poll() is None, lambda: str(ranks[0].output()))
    finally:
        for rank in ranks:
            rank.end()
    before = (run_dir / "checkpoints" / "latest").read_text()
    result = train_forked(1, *RUN, *batch, f"--train.run_dir={run_dir}")
    assert result.returncode == 0, result
    after = {record["step"]: record for record in records(run_dir)}
    tokens = {step: record["train/tokens"] for step, record in after.items()}
    assert tokens == {step: step * 2 * 2 * 32 for step in range(1, STEPS + 1)}  # micro batch x two ranks x length
    first = int(before.removeprefix("step_")) + 1
    # Sums over the sequences are formed in another order.
    assert after[first]["train/cross_entropy"] == pytest.approx(uninterrupted[first]["train/cross_entropy"], abs=1e-5)
    if batch:  # else the balance loss is of each half of a step's tokens, and its gradient another
        expected = {step: record["train/loss"] for step, record in uninterrupted.items()}
        assert losses(run_dir) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_sigterm_to_keep_running_saves_and_starts_nothing(tmp_path: Path, uninterrupted: dict[int, Any]) -> None:
    run_dir = tmp_path / "run"
    with launched(tmp_path, *keep_running(), *deepspeed(), *RUN, f"--train.run_dir={run_dir}") as command:
        command.wait_for_step(run_dir, 5)
        command.process.terminate()
        result = command.end()
        assert result.returncode == 75, result
        assert "SIGTERM: no restart any more" in result.stdout, result
        assert "restart 1" not in result.stdout, result
        assert not marked_processes(command.marker)
    last = records(run_dir)[-1]["step"]
    assert 5 <= last < STEPS
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"
    assert train_forked(2, *RUN, f"--train.run_dir={run_dir}").returncode == 0
    assert losses(run_dir) == {step: record["train/loss"] for step, record in uninterrupted.items()}


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "command.sh"
    path.write_text(f"echo life >> {tmp_path}/lives\n{text}\n")
    return ["bash", str(path)]


def lives(tmp_path: Path) -> int:
    return len((tmp_path / "lives").read_text().splitlines())


@pytest.mark.parametrize("code", [0, 2, 75])
def test_ends_that_are_not_restarted(tmp_path: Path, code: int) -> None:
    result = run_process([*keep_running(), *script(tmp_path, f"exit {code}")], 20)
    assert (result.returncode, lives(tmp_path)) == (code, 1), result


def test_a_usage_error_is_not_restarted(tmp_path: Path) -> None:
    train = [sys.executable, "launch/train.py", f"--train.run_dir={tmp_path / 'run'}", "--train.stepz=3"]
    result = run_process([*keep_running(), *train], 60, env=CPU, cwd=ROOT)
    assert result.returncode == 2, result
    assert "restart" not in result.stderr, result


def test_restarts_without_progress_are_counted(tmp_path: Path) -> None:
    result = run_process([*keep_running("--max-restarts", "2"), *script(tmp_path, "exit 70")], 20)
    assert (result.returncode, lives(tmp_path)) == (70, 3), result
    assert "exit code 70: restart 2 of 2" in result.stderr
    assert "given up after 2 restarts without progress" in result.stderr


def test_progress_makes_the_count_begin_anew(tmp_path: Path) -> None:
    # Five lives with a new checkpoint each, then none: two restarts more.
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    count = f"$(wc -l < {tmp_path}/lives)"
    command = script(tmp_path, f"[ {count} -gt 5 ] || echo step_{count} > {latest}\nexit 1")
    result = run_process([*keep_running("--max-restarts", "2"), *command, f"--train.run_dir={tmp_path / 'run'}"], 20)
    assert (result.returncode, lives(tmp_path)) == (1, 7), result


def test_an_end_without_a_summary_is_a_fault(tmp_path: Path) -> None:
    # As deepspeed returns it when its launcher was killed.
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    command = script(tmp_path, f"[ $(wc -l < {tmp_path}/lives) = 1 ] || echo done > {run_dir}/summary.json")
    result = run_process([*keep_running("--run-dir", str(run_dir)), *command], 20)
    assert (result.returncode, lives(tmp_path)) == (0, 2), result
    assert "summary.json was not written: a fault" in result.stderr


def test_what_a_command_leaves_running_is_ended_before_the_next(tmp_path: Path) -> None:
    # In a session of its own, as torchrun's ranks are.
    leave = f"[ $(wc -l < {tmp_path}/lives) = 1 ] || exit 0\nsetsid sleep 300 > {tmp_path}/left 2>&1 &\nexit 1"
    with launched(tmp_path, *keep_running(), *script(tmp_path, leave)) as command:
        result = command.end()
        assert not marked_processes(command.marker)
    assert (result.returncode, lives(tmp_path)) == (0, 2), result
    assert "still running, now ended by SIGTERM" in result.stdout, result


def test_a_signal_while_waiting_starts_nothing(tmp_path: Path) -> None:
    args = [KEEP_RUNNING, "--wait", "60", "--", *script(tmp_path, "exit 70")]
    with launched(tmp_path, *args) as command:
        while "restart 1 of 3" not in command.text():
            assert command.process.poll() is None, command.text()
            time.sleep(0.02)
        command.process.send_signal(signal.SIGINT)
        result = command.end()
    assert (result.returncode, lives(tmp_path)) == (70, 1), result


@pytest.mark.parametrize("arguments", [["--max-restarts", "x", "--", "true"], ["true"], ["--"], ["--retries", "3"]])
def test_wrong_arguments_are_named(arguments: list[str]) -> None:
    result = run_process([KEEP_RUNNING, *arguments], 20)
    assert result.returncode == 2, result
    assert "usage: launch/keep_running.sh" in result.stderr
