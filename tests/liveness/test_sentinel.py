"""The sentinel of a rank, with real processes: a small launcher that starts a small rank, and what is left of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_train.host.processes import process_mark
from moe_train.liveness.sentinel_process import count_memory_kills, describe_checkpoint, describe_signal, is_adopter
from tests.processes import MARKER, end_processes, marked_processes
from tests.train.runs import ROOT

SECONDS = 20  # of a busy machine; the sentinel acts after one
AS_TORCHRUN = {"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}

# A rank that tells its sentinel of a run folder, and starts a process of its own.
RANK = """
import os, pathlib, subprocess, sys, time
from moe_train.liveness.sentinel import start_sentinel
{before}
sentinel = start_sentinel(os.environ)
folder = pathlib.Path({folder!r})
sentinel.tell_run_folder(folder / "log", folder / "checkpoints")
child = subprocess.Popen(["sleep", "100"])
(folder / "rank").write_text(str(os.getpid()))
{after}
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"


@dataclass
class Launched:
    """A launcher with its rank."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    marker: str

    @property
    def rank(self) -> int:
        wait_until((self.folder / "rank").exists)
        wait_until(lambda: (self.folder / "rank").read_text() != "")
        return int((self.folder / "rank").read_text())

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text() if (self.folder / "log").exists() else ""

    @property
    def is_gone(self) -> bool:
        return not marked_processes(self.marker)

    @property
    def terminal(self) -> str:
        return (self.folder / "terminal").read_text()


def wait_until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts a launcher whose rank runs `before` first, and `after` once the sentinel is there."""
    started: list[Launched] = []

    def start(after: str = "time.sleep(100)", before: str = "", launcher: str = LAUNCHER, **variables: str) -> Launched:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "latest").write_text("step_00000040\n")
        marker = f"{tmp_path.name}-{os.getpid()}"
        program = RANK.format(before=before, after=after, folder=str(tmp_path))
        with (tmp_path / "terminal").open("wb") as terminal:
            process = subprocess.Popen(
                [sys.executable, "-c", launcher, program],
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=terminal,
                env={**os.environ, **AS_TORCHRUN, **variables, "PYTHONPATH": str(ROOT), MARKER: marker},
                start_new_session=True,
            )
        started.append(Launched(process, tmp_path, marker))
        return started[-1]

    yield start
    for each in started:
        end_processes(each.process.pid, each.marker)
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.process.wait(5)


HOLDS_THE_LOCK = "import ctypes; ctypes.PyDLL(None).sleep(100)"  # as a library that is loaded from a slow disk


@pytest.mark.parametrize("after", ["time.sleep(100)", HOLDS_THE_LOCK], ids=["waits", "holds the interpreter's lock"])
def test_a_rank_ends_with_its_launcher(launch: Callable[..., Launched], after: str) -> None:
    launched = launch(after)
    rank = launched.rank
    time.sleep(1.0)
    assert not launched.log
    launched.process.kill()
    launched.process.wait()
    wait_until(lambda: launched.is_gone)  # and what the rank has started
    for text in (launched.log, launched.terminal):
        assert f"rank 1 (pid {rank} on " in text and "its launcher (torchrun) is gone; last checkpoint: step 40" in text


def test_a_launcher_that_ended_before_the_first_line(launch: Callable[..., Launched]) -> None:
    leaves = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
    launched = launch(before="\nwhile os.getppid() == " + "int(os.environ['LAUNCHER']): time.sleep(0.01)", launcher=(
        "import os; os.environ['LAUNCHER'] = str(os.getpid())\n" + leaves))  # fmt: skip
    launched.process.wait()
    if not is_adopter(1):
        pytest.skip("process 1 of this machine looks like a launcher")
    wait_until(lambda: launched.is_gone)
    assert "its launcher (torchrun) is gone" in launched.terminal


def test_the_owner_of_the_launcher_ended_before(launch: Callable[..., Launched]) -> None:
    with subprocess.Popen(["sleep", "100"]) as owner:
        mark = process_mark(owner.pid)
        owner.kill()
    launched = launch(MOE_TRAIN_LAUNCH_OWNER=mark)
    wait_until(lambda: launched.is_gone)
    assert "its launcher (torchrun) is gone" in launched.terminal


def test_a_killed_rank_is_named(launch: Callable[..., Launched]) -> None:
    launched = launch("child.kill(); time.sleep(100)")
    rank = launched.rank
    time.sleep(0.5)
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: launched.is_gone)
    for text in (launched.log, launched.terminal):
        assert f"rank 1 (pid {rank} on " in text and "signal 9 (SIGKILL; " in text
        assert text.endswith("last checkpoint: step 40\n")


@pytest.mark.parametrize("end", ["sys.exit(3)", "raise ValueError", "sentinel.leave(); os._exit(0)"])
def test_a_rank_that_ends_by_itself_is_left_alone(launch: Callable[..., Launched], end: str) -> None:
    launched = launch(f"child.kill(); child.wait(); {end}")
    wait_until(lambda: launched.is_gone)
    assert "rank 1" not in launched.log + launched.terminal


def test_a_rank_that_was_told_to_stop_may_save(launch: Callable[..., Launched]) -> None:
    # As after Ctrl-C at deepspeed, whose front end ends at once.
    launched = launch("import signal; signal.signal(signal.SIGINT, lambda *_: None); time.sleep(4); child.kill()")
    rank = launched.rank
    time.sleep(1.0)
    os.killpg(launched.process.pid, signal.SIGINT)
    launched.process.kill()
    launched.process.wait()
    time.sleep(2.0)
    assert rank in marked_processes(launched.marker)
    wait_until(lambda: launched.is_gone)
    assert "is gone" not in launched.log


def test_no_launcher_no_sentinel() -> None:
    """A rank that a user's script has started, which may end before the rank."""
    code = "import os; from moe_train.liveness.sentinel import start_sentinel; print(start_sentinel({'RANK': '0'}).pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "None"


def test_descriptions(tmp_path: Path) -> None:
    assert "often for lack of memory" in describe_signal(9, None)
    assert "by the kernel, for lack of memory" in describe_signal(9, 2)
    assert "not by the kernel" in describe_signal(9, 0)
    assert describe_signal(11, 0) == "was ended by signal 11 (SIGSEGV)"
    assert "is gone without a word" in describe_signal(0, None)
    assert describe_checkpoint(str(tmp_path)) == "there is no checkpoint yet"
    kills = count_memory_kills()
    assert kills is None or kills >= 0
