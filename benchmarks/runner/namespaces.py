"""Network namespaces of this machine: the commands that make them, and how what a program made is taken down again.

A namespace's name begins with its program's prefix and the id of the process that made it, so that those which a killed
process has left can be told and removed.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND_SECONDS = 30
END_SECONDS = 5  # for what still runs in a namespace to be gone after SIGKILL
_FOLDERS = "/usr/sbin:/sbin:/usr/bin:/bin"  # of ip, tc and sshd, which are not in everyone's PATH


def command_path() -> str:
    """PATH, and the folders of an administrator's commands."""
    return f"{os.environ.get('PATH', '')}:{_FOLDERS}"


def run_command(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever its exit code.

    It has a session of its own: Ctrl-C in a terminal is for the caller, and must not end what takes namespaces down.
    """
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        start_new_session=True,
        env={**os.environ, "PATH": command_path()},
    )


def answer_of(result: subprocess.CompletedProcess[str]) -> str:
    """What a command says that failed."""
    return " ".join(result.stderr.split()) or f"exit code {result.returncode}"


def namespaces_of(prefix: str) -> list[str]:
    """Those of this machine whose names begin with a prefix."""
    lines = run_command("ip", "netns", "list").stdout.splitlines()  # NAME (id: N)
    return [line.split()[0] for line in lines if line.startswith(f"{prefix}-")]


def left_over(prefix: str) -> list[str]:
    """Those of a prefix whose process is gone."""
    found = namespaces_of(prefix)
    return [name for name in found if not Path("/proc", name.removeprefix(f"{prefix}-").partition("-")[0]).exists()]


def remove_namespaces(names: Sequence[str]) -> None:
    """Remove namespaces, with what runs in them and their interfaces.

    Raises:
        RuntimeError: If one is still there, after all have been tried.
    """
    failed = []
    for name in names:
        deadline = time.monotonic() + END_SECONDS
        while (pids := run_command("ip", "netns", "pids", name).stdout.split()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)
        result = run_command("ip", "netns", "delete", name)
        if result.returncode:
            failed.append(f"{name}: {answer_of(result)}")
    if failed:
        raise RuntimeError(f"network namespaces could not be removed ({'; '.join(failed)}): ip netns delete NAME")
