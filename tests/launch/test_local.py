"""What `make train` starts: its exit codes, and that all of it ends with make. Real processes in deepspeed's place."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import MARKER, end_processes, marked_processes, run_process
from tests.train.runs import ROOT

PROGRAM = """
import os, sys
from moe_train.launch.local import LocalLaunch
sys.exit(LocalLaunch(sys.argv[1:], os.getppid()).run())
"""


@pytest.mark.parametrize(
    ("script", "code"),
    [
        pytest.param("exit 0", 0, id="done"),
        pytest.param("exit 2", 2, id="bad usage"),
        pytest.param("exit 65", 65, id="diverged"),
        pytest.param("exit 247", 70, id="a rank got SIGKILL"),
        pytest.param("exit 245", 70, id="a rank got SIGSEGV"),
        pytest.param("kill -9 $$", 70, id="deepspeed got SIGKILL"),
        pytest.param("kill -USR2 $PPID; sleep 1; exit 0", 70, id="its launcher was killed, and a sentinel told"),
    ],
)
def test_exit_codes(script: str, code: int) -> None:
    result = run_process([sys.executable, "-c", PROGRAM, "sh", "-c", script], 60, cwd=ROOT)
    assert result.returncode == code, result


def start(folder: Path, script: str) -> "subprocess.Popen[bytes]":
    """A shell in make's place, and below it the launch of a script."""
    shell = f"{sys.executable} -c '{PROGRAM}' sh -c '{script}'; echo $? > {folder}/code"
    return subprocess.Popen(
        ["sh", "-c", shell], cwd=ROOT, env={**os.environ, MARKER: str(folder)}, start_new_session=True
    )


def wait_for(folder: Path, name: str) -> str:
    deadline = time.monotonic() + 30
    while not ((folder / name).exists() and (folder / name).read_text().strip()):
        assert time.monotonic() < deadline, name
        time.sleep(0.05)
    return (folder / name).read_text().strip()


def test_all_ends_with_make(tmp_path: Path) -> None:
    make = start(tmp_path, f"echo up > {tmp_path}/up; setsid sleep 100; true")
    try:
        wait_for(tmp_path, "up")
        make.kill()
        make.wait()
        deadline = time.monotonic() + 20
        while marked_processes(str(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        end_processes(make.pid, str(tmp_path))


@pytest.mark.parametrize(
    ("script", "said", "code"),
    [
        pytest.param('trap "exit 75" USR1; echo up > {0}/up; while :; do sleep 0.1; done', "RANK=0", "75", id="ranks"),
        pytest.param("echo up > {0}/up; sleep 100; true", "NONE=0", "75", id="no ranks yet"),
    ],
)
def test_sigterm_is_handed_on_in_order(tmp_path: Path, script: str, said: str, code: str) -> None:
    (tmp_path / "rank.sh").write_text(script.format(tmp_path))
    make = start(tmp_path, f"env {said} sh {tmp_path}/rank.sh")
    try:
        wait_for(tmp_path, "up")
        launch = next(pid for pid in marked_processes(str(tmp_path)) if is_launch(pid))
        os.kill(launch, signal.SIGTERM)
        assert wait_for(tmp_path, "code") == code
        assert not [pid for pid in marked_processes(str(tmp_path)) if pid != make.pid]
    finally:
        end_processes(make.pid, str(tmp_path))
        make.wait()


def is_launch(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b"-c" in words and b"LocalLaunch" in words[2] and b"python" in words[0]
