"""Commands run by tests: each in its own process group, with a time limit after which nothing of it is left."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

MARKER = "MOE_TRAIN_TEST_COMMAND"  # a command's processes carry its own value of this environment variable
TERMINATION_SECONDS = 2  # between SIGTERM and SIGKILL
TAIL_CHARACTERS = 4000  # of either stream in an error message
# Words before a command. /proc hides the processes of others, and then the command is one of a user who is not root:
# without capabilities, and not in root's group.
HIDES = ["unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$0" "$@"']
DROPS = ["setpriv", "--regid", "65534", "--clear-groups", "--bounding-set", "-all", "--inh-caps", "-all", "--"]


@dataclass(frozen=True)
class ProcessResult:
    """What a command left: its exit code (negative: a signal), its output, and the seconds it took."""

    args: list[str]
    returncode: int
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        streams = {"stdout": self.stdout, "stderr": self.stderr}
        tails = "".join(f"\n--- {name}\n{text[-TAIL_CHARACTERS:]}" for name, text in streams.items())
        return f"{' '.join(self.args)}: exit code {self.returncode} after {self.seconds:.1f} s{tails}"


def run_process(
    args: Sequence[str | Path],
    timeout: float,
    env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
) -> ProcessResult:
    """Runs a command and waits for its end and that of everything that holds its output.

    Args:
        args: the command and its arguments.
        timeout: seconds; afterwards the command and all that it started are ended.
        env: changes to the environment of this process; None removes a variable.
        cwd: the folder to run in.
    Returns: exit code, output and time, whatever the exit code is.
    Raises: TimeoutError with the output so far.
    """
    command = [str(arg) for arg in args]
    marker = uuid.uuid4().hex
    changed = {**os.environ, **(env or {}), MARKER: marker}
    environ = {name: value for name, value in changed.items() if value is not None}
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environ,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
        timed_out = False
    except subprocess.TimeoutExpired:
        timed_out = True
        end_processes(process.pid, marker)
        stdout, stderr = process.communicate()
    except BaseException:
        end_processes(process.pid, marker)
        raise
    result = ProcessResult(command, process.returncode, stdout, stderr, time.monotonic() - start)
    if timed_out:
        raise TimeoutError(f"no end within {timeout} s: {result}")
    return result


def needs(*words: str) -> None:
    """Skips the test where a command cannot be run with these words before it, as by a user who is not root."""
    try:
        done = subprocess.run([*words, "true"], capture_output=True, timeout=20)
    except OSError:
        pytest.skip(f"{words[0]} is not installed")
    if done.returncode:
        pytest.skip(f"{' '.join(words)}: {done.stderr.decode()}")


def end_processes(group: int, marker: str) -> None:
    """Ends a process group and all processes with the marker: launchers put their ranks in groups of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + TERMINATION_SECONDS
    while marked_processes(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in marked_processes(marker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked_processes(marker: str) -> list[int]:
    """Living processes that carry the marker in their environment (Linux: read from /proc)."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
