"""The sentinel of a rank, with real processes: a small launcher that starts a small rank, and what is left of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from moe_train.host.control_groups import control_groups, count_memory_kills
from moe_train.host.process_identity import ProcessIdentity
from moe_train.host.processes import status
from moe_train.liveness.sentinel_process import describe_checkpoint, describe_signal, is_adopter, program_of
from tests.processes import DROPS, HIDES, MARKER, end_processes, marked_processes, needs
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
        found = status(owner.pid)
        assert found is not None
        identity = replace(ProcessIdentity.own(), pid=owner.pid, started=found.started)
        owner.kill()
    launched = launch(MOE_TRAIN_LAUNCH_OWNER=str(identity))
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


BELOW = "import os, subprocess, sys; sys.exit(subprocess.run([{words}sys.executable, '-c', sys.argv[-1]]).returncode)"
NEW_PIDS = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]

AS_CHILD = f"""
import os, subprocess, sys
os.environ["RANK_PROGRAM"] = sys.argv[1]
sys.exit(subprocess.run({NEW_PIDS!r} + ["sh", "-c", sys.executable + ' -c "$RANK_PROGRAM"; exit $?']).returncode)
"""


def below(*words: str) -> str:
    """A launcher that starts its rank by further words."""
    return BELOW.format(words="".join(f"{word!r}, " for word in words))


LIVES = "time.sleep(4); child.kill(); (folder / 'done').touch()"


def test_a_parent_that_proc_hides_is_not_gone(launch: Callable[..., Launched]) -> None:
    """As slurmstepd, of root, on hosts whose /proc is mounted with hidepid=2."""
    needs(*HIDES, *DROPS)
    inner = below(*DROPS)
    outer = f"import os, sys; os.execvp('unshare', {HIDES!r} + [sys.executable, '-c', {inner!r}, sys.argv[1]])"
    launched = launch("print(os.path.exists(f'/proc/{os.getppid()}'), flush=True); time.sleep(100)", launcher=outer)
    rank = launched.rank
    time.sleep(4)
    assert launched.terminal == "False\n" and rank in marked_processes(launched.marker)
    launched.process.kill()
    launched.process.wait()
    wait_until(lambda: launched.is_gone)
    assert "its launcher (torchrun) is gone" in launched.log


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(below(*NEW_PIDS), id="process 1 of a container"),
        pytest.param(AS_CHILD, id="child of process 1"),
    ],
)
def test_a_rank_in_a_container_of_its_own_lives(launch: Callable[..., Launched], launcher: str) -> None:
    needs(*NEW_PIDS)
    launched = launch(LIVES, launcher=launcher)
    assert launched.rank < 10 and launched.process.wait(SECONDS) == 0
    assert (launched.folder / "done").exists() and launched.terminal == ""


def with_torchrun(folder: Path, command: str) -> str:
    """A launcher that runs a shell's command, in which {} is a torchrun."""
    (folder / "torchrun").write_text(LAUNCHER)
    line = command.format(f'{sys.executable} {folder}/torchrun "$RANK_PROGRAM"')
    return f"import os, sys; os.environ['RANK_PROGRAM'] = sys.argv[1]; os.execvp('sh', ['sh', '-c', {line!r}])"


def test_a_shell_that_started_a_launcher_in_the_background_may_end(
    launch: Callable[..., Launched], tmp_path: Path
) -> None:
    command = f"nohup {{}} & while ! test -e {tmp_path}/rank; do sleep 0.1; done; sleep 1"
    launched = launch(LIVES, launcher=with_torchrun(tmp_path, command))
    assert launched.process.wait(SECONDS) == 0
    wait_until((tmp_path / "done").exists)
    assert "is gone" not in launched.terminal


def test_a_rank_ends_with_make(launch: Callable[..., Launched], tmp_path: Path) -> None:
    """The recipe's shell and the launcher live on, as after a SIGKILL to make alone."""
    needs("make", "--version")
    (tmp_path / "Makefile").write_text(f'all:\n\t@{sys.executable} {tmp_path}/torchrun "$$RANK_PROGRAM"; true\n')
    launched = launch(launcher=with_torchrun(tmp_path, f"exec make -f {tmp_path}/Makefile # {{}}"))
    rank = launched.rank
    time.sleep(1)
    assert rank in marked_processes(launched.marker)
    launched.process.kill()
    launched.process.wait()
    wait_until(lambda: rank not in marked_processes(launched.marker))
    assert "its launcher (torchrun) is gone" in launched.log


@pytest.fixture
def memory_group(request: pytest.FixtureRequest) -> Iterator[Callable[[], Path]]:
    """Makes control groups of 64 MiB for processes, of version 1 or 2."""
    made: list[Path] = []

    def make() -> Path:
        group = next(control_groups("memory"), None)
        if group is None:
            pytest.skip("no control groups of memory")
        folder, limit = group.folder / f"moe_train_{os.getpid()}_{len(made)}", f"{64 * 2**20}"
        try:
            folder.mkdir()
            made.append(folder)
            (folder / ("memory.limit_in_bytes" if group.version == 1 else "memory.max")).write_text(limit)
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        return folder

    yield make
    for folder in made:
        wait_until(lambda at=folder: not (at / "cgroup.procs").read_text().strip())
        folder.rmdir()


def joins(group: Path) -> str:
    return f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"


USES_MUCH = "b'1' * 2**28"


def test_the_kernel_killed_the_rank(launch: Callable[..., Launched], memory_group: Callable[[], Path]) -> None:
    launched = launch(f"child.kill(); {USES_MUCH}; time.sleep(100)", before=joins(memory_group()))
    wait_until(lambda: launched.is_gone)
    assert "(SIGKILL; by the kernel, for lack of memory)" in launched.log


def test_the_kernel_killed_another(launch: Callable[..., Launched], memory_group: Callable[[], Path]) -> None:
    """A process of another job on the same host, before somebody kills the rank."""
    launched = launch("child.kill(); time.sleep(100)", before=joins(memory_group()))
    rank = launched.rank
    time.sleep(1)
    other = subprocess.run([sys.executable, "-c", f"import os; {joins(memory_group())}; {USES_MUCH}"])
    assert other.returncode == -signal.SIGKILL
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: launched.is_gone)
    assert "(SIGKILL; not by the kernel for lack of memory)" in launched.log


def test_no_launcher_no_sentinel() -> None:
    """A rank that a user's script has started, which may end before the rank."""
    code = "import os; from moe_train.liveness.sentinel import start_sentinel; print(start_sentinel({'RANK': '0'}).pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "None"


def test_descriptions(tmp_path: Path) -> None:
    assert "often for lack of memory" in describe_signal(9, None)
    assert "by the kernel, for lack of memory" in describe_signal(9, 2)
    assert "not by the kernel" in describe_signal(9, 0)
    assert describe_signal(40, 0) == "was ended by signal 40"  # a real-time signal, which has no name
    assert describe_signal(11, 0) == "was ended by signal 11 (SIGSEGV)"
    assert "is gone without a word" in describe_signal(0, None)
    assert describe_checkpoint(str(tmp_path)) == "there is no checkpoint yet"
    kills = count_memory_kills()
    assert kills is None or kills >= 0


@pytest.mark.parametrize(
    ("line", "program"),
    [
        ("/opt/bin/deepspeed --num_gpus 2 train.py", "deepspeed"),
        ("/usr/bin/python3.11 -u -X dev -m deepspeed.launcher.launch --world_info=x", "deepspeed.launcher.launch"),
        ("python /opt/bin/torchrun train.py", "torchrun"),
        ("python -c pass torchrun", "python"),
        ("-bash", "bash"),
        ("", ""),
    ],
)
def test_the_program_of_a_command_line(line: str, program: str) -> None:
    assert program_of(line.split(" ")) == program
    assert program_of(["slurmstepd: [4711.0]"]) == "slurmstepd" and program_of([]) == ""
