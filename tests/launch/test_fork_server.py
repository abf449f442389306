"""Forked processes: what comes back, what is their own, signals, and that nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from moe_train.launch.fork_server import ForkServer, wait_for_all
from tests.processes import run_process
from tests.ranks import environment
from tests.train.runs import ROOT

HERE = "tests.launch.test_fork_server"
SECONDS = 60


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(["torch", HERE], {**os.environ, "MOE_TRAIN_OF_SERVER": "1"}) as server:
        yield server


def write(arguments: Sequence[str]) -> int:
    """Writes to both streams, from Python and around it, and returns a code."""
    print("first", arguments[1])
    os.write(2, b"second\n")
    print("third", file=sys.stderr)
    return int(arguments[0])


def fail(arguments: Sequence[str]) -> int:
    raise ZeroDivisionError("made by a child")


def sleep(arguments: Sequence[str]) -> int:
    """Ends by itself where a signal of a process of its own would not end it."""
    print("up", flush=True)
    time.sleep(600)
    return 0


def sleep_with_child(arguments: Sequence[str]) -> int:
    """Says the pid of a process that it has started."""
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
    return sleep(arguments)


def tell(arguments: Sequence[str]) -> int:
    """Says what a process finds out about itself."""
    import torch

    handlers = {number.name: signal.getsignal(number) for number in signal.Signals if number not in (9, 19)}
    print(
        json.dumps(
            {
                "environment": dict(os.environ),
                "arguments": sys.argv,
                "folder": os.getcwd(),
                "session": os.getsid(0) == os.getpid(),
                "ignored": sorted(name for name, handler in handlers.items() if handler == signal.SIG_IGN),
                "handled": sorted(name for name, handler in handlers.items() if callable(handler)),
                "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
                "threads": torch.get_num_threads(),
            }
        )
    )
    return 0


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], object], seconds: float = 20) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("code", [0, 2, 75])
def test_outputs_and_exit_code_come_back(server: ForkServer, code: int) -> None:
    result = server.start(f"{HERE}:write", [str(code), "näher"], os.environ).wait(SECONDS)
    assert (result.returncode, result.stdout, result.stderr) == (code, "first näher\n", "second\nthird\n")
    assert 0 < result.seconds < SECONDS


def test_an_exception_ends_with_its_traceback_and_code_one(server: ForkServer) -> None:
    result = server.start(f"{HERE}:fail", [], os.environ).wait(SECONDS)
    assert result.returncode == 1 and "ZeroDivisionError: made by a child" in result.stderr
    assert server.start(f"{HERE}:nothing", [], os.environ).wait(SECONDS).returncode == 1  # and the server goes on


def test_what_a_process_has_of_its_own(server: ForkServer, tmp_path: Path) -> None:
    own = {"PATH": os.environ["PATH"], "RANK": "3", "OMP_NUM_THREADS": "2"}
    result = server.start(f"{HERE}:tell", ["a", "-b"], own, tmp_path).wait(SECONDS)
    assert result.returncode == 0, result
    told = json.loads(result.stdout)
    assert told["environment"] == own  # and nothing of the server's
    assert told["arguments"] == [f"{HERE}:tell", "a", "-b"]
    assert told["folder"] == str(tmp_path)
    assert told["session"]
    assert told["threads"] == 2
    second = json.loads(server.start(f"{HERE}:tell", [], os.environ).wait(SECONDS).stdout)
    assert second["folder"] == os.getcwd() and "RANK" not in second["environment"]


def test_signals_are_those_of_a_new_interpreter() -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts in the background
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        server = ForkServer([], os.environ)
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with server:
        told = json.loads(server.start(f"{HERE}:tell", [], os.environ).wait(SECONDS).stdout)
    assert told["ignored"] == ["SIGPIPE", "SIGXFSZ"] and told["handled"] == ["SIGINT"] and told["blocked"] == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_one_of_them_with_its_negative_code(server: ForkServer, signum: signal.Signals) -> None:
    first, second = (server.start(f"{HERE}:sleep", [], os.environ) for _ in range(2))
    assert eventually(lambda: first.output()[0] == second.output()[0] == "up\n")
    assert first.poll() is second.poll() is None
    second.kill(signum)
    assert second.wait(SECONDS).returncode == second.poll() == -signum
    assert first.poll() is None
    first.kill(signum)
    assert first.wait(SECONDS).returncode == -signum
    first.kill()  # nothing is there to take it


def test_a_signal_right_after_the_start_ends_it_too(server: ForkServer) -> None:
    for _ in range(20):
        rank = server.start(f"{HERE}:sleep", [], os.environ)
        rank.kill(signal.SIGTERM)
        assert rank.wait(SECONDS).returncode == -signal.SIGTERM


def test_waiting_for_all_leaves_none(server: ForkServer) -> None:
    quick, slow = (server.start(f"{HERE}:{name}", ["0", "x"], os.environ) for name in ("write", "sleep_with_child"))
    assert eventually(lambda: slow.output()[0].endswith("up\n"))
    child = int(slow.output()[0].split()[0])
    assert is_alive(child) and quick.wait(SECONDS).returncode == 0
    with pytest.raises(TimeoutError, match=r"(?s)within 0.1 s.*up"):
        wait_for_all([quick, slow], timeout=0.1)
    assert not is_alive(quick.pid) and not is_alive(slow.pid) and eventually(lambda: not is_alive(child))
    assert slow.wait(0).returncode == -signal.SIGKILL
    codes = [rank.returncode for rank in wait_for_all([server.start(f"{HERE}:write", ["3", ""], os.environ)], SECONDS)]
    assert codes == [3]


def test_waiting_for_one_leaves_it_running(server: ForkServer) -> None:
    rank = server.start(f"{HERE}:sleep", [], os.environ)
    with pytest.raises(TimeoutError):
        rank.wait(0.05)
    assert rank.poll() is None and is_alive(rank.pid)
    rank.end()
    assert rank.poll() == -signal.SIGKILL and not is_alive(rank.pid)


def test_closing_ends_all_of_them() -> None:
    with ForkServer([], os.environ) as server:
        rank = server.start(f"{HERE}:sleep", [], os.environ)
        assert is_alive(server.pid) and is_alive(rank.pid)
    assert server.closed and not is_alive(server.pid) and not is_alive(rank.pid)
    server.close()
    rank.kill()
    rank.end()
    with pytest.raises(RuntimeError, match="closed"):
        rank.poll()


def test_a_module_that_cannot_be_imported_is_said() -> None:
    with ForkServer(["moe_train.nowhere"], os.environ) as server:
        with pytest.raises(RuntimeError, match=r"(?s)ended with code 1.*moe_train\.nowhere"):
            server.start(f"{HERE}:sleep", [], os.environ)
    assert server.closed


OWNER = f"""
import os, time
from moe_train.launch.fork_server import ForkServer
server = ForkServer([], os.environ)
rank = server.start("{HERE}:sleep", [], os.environ)
print(server.pid, rank.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_process_that_started_it(signum: signal.Signals) -> None:
    command = [sys.executable, "-c", OWNER]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=take_interrupts)
    try:
        assert owner.stdout is not None
        server, rank = map(int, owner.stdout.readline().split())
        assert is_alive(server) and is_alive(rank)
        owner.send_signal(signum)
        owner.wait(SECONDS)
    finally:
        owner.kill()
        owner.communicate()
    assert eventually(lambda: not is_alive(server) and not is_alive(rank))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_parity_that_is_stopped_leaves_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, "-m", "moe_train", "parity", f"--keep={tmp_path}", "--max-ranks=2", "--layouts=1"]
    with environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        parity = subprocess.Popen(command, cwd=ROOT, preexec_fn=take_interrupts, **silent)
    try:
        assert eventually(lambda: (tmp_path / "layout_00" / "logs").exists() or parity.poll() is not None, SECONDS)
        started = descendants(parity.pid)
        assert len(started) >= 2  # the server and a rank
        parity.send_signal(signum)
        parity.wait(SECONDS)
        assert not any(map(is_alive, started))
    finally:
        parity.kill()
        parity.wait()


def take_interrupts() -> None:
    """In a child that is to be interrupted: it ignores SIGINT where a shell started the tests in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    listed = run_process(["ps", "-eo", "pid=,ppid="], timeout=SECONDS).stdout.splitlines()
    parents = {int(child): int(parent) for child, parent in map(str.split, listed)}
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [one for child in children for one in descendants(child)]
