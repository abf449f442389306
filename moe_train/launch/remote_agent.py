"""Agent that `moe-train launch` runs on each host over ssh. It checks the host first, and ends the ranks at the end.

It is sent as source text and uses only the standard library, so that it can report on a host that lacks everything
else. It first writes a report as one line of JSON; then it writes the number of ranks, one line per change. It reads
one word per line: `alive` must come every few seconds, `stop` sends SIGUSR1 to every rank (they save and end), and
`end` ends the launch on this host. At `end`, at the end of its input, and after 25 s without input (the launch is
gone, or the link is cut), the agent ends every process of the launch, and then itself. These processes carry the
launch's mark in their environment.
"""

import contextlib
import fcntl
import importlib
import importlib.metadata
import json
import os
import platform
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any

RANKS = (b"LOCAL_RANK=", b"OMPI_COMM_WORLD_RANK=", b"PMI_RANK=")
GET_ADDRESS, GET_MASK = 0x8915, 0x891B  # Linux: SIOCGIFADDR, SIOCGIFNETMASK
LOOK_SECONDS, SILENCE_SECONDS, TERM_SECONDS = 1.0, 25.0, 8.0


def report(task: dict[str, Any]) -> dict[str, Any]:
    """Report what this host has.

    Args:
        task: program; python, the interpreter; names, of hosts to resolve; port, to try (0: choose one).
    """
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "missing": [],
        "versions": {},
        "addresses": {},
        "networks": networks(),
        "port": None,
        "taken": None,
    }
    try:
        found["versions"]["moe_train"] = importlib.import_module("moe_train.config.version").VERSION
    except ImportError as error:
        found["missing"].append(f"the package moe_train ({error})")
    found["versions"]["python"] = ".".join(platform.python_version_tuple()[:2])
    for name in ("torch", "deepspeed"):
        try:
            found["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["missing"].append("the package " + name)
    program = task["program"]
    if program.endswith(".py"):
        if not os.path.isfile(program):
            found["missing"].append(f"the script {program} in {os.getcwd()}")
    elif shutil.which(program, path=os.path.dirname(task["python"]) + os.pathsep + os.environ.get("PATH", "")) is None:
        found["missing"].append("the command " + program)
    for name in task["names"]:
        with contextlib.suppress(OSError):  # a name that only ssh's configuration knows
            found["addresses"][name] = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    try:
        with socket.create_server(("", task["port"])) as server:
            found["port"] = server.getsockname()[1]
    except OSError as error:
        found["taken"] = error.strerror or str(error)
    return found


def networks() -> dict[str, int]:
    """Return the prefix length of each IPv4 address of this host, without loopback."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:  # struct ifreq: name[16], family[2], port[2], address[4]
                address, mask = (fcntl.ioctl(probe.fileno(), ask, request)[20:24] for ask in (GET_ADDRESS, GET_MASK))
            except OSError:  # an interface without an IPv4 address
                continue
            if address[0] != 127:
                found[socket.inet_ntoa(address)] = int.from_bytes(mask, "big").bit_count()
    return found


def marked(mark: str) -> dict[int, list[bytes]]:
    """Find the processes of the launch; their environments by pid."""
    wanted = mark.encode()
    found: dict[int, list[bytes]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue  # the process has ended, or belongs to another user
            if wanted in words:
                found[int(name)] = words
    return found


def ranks(mark: str) -> list[int]:
    """Find the pids of the ranks, without the processes that ranks have started."""
    each = {pid for pid, words in marked(mark).items() if any(word.startswith(RANKS) for word in words)}
    return [pid for pid in each if parent(pid) not in each]


def parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):  # the process has ended
            os.kill(pid, number)


def end(mark: str) -> int:
    """End all processes of the launch, and return how many there were."""
    count = len(marked(mark))
    for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, TERM_SECONDS)):
        send(marked(mark), number)
        deadline = time.monotonic() + seconds
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
    return count


def say(values: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the launch may be gone; the processes must be ended all the same
        os.write(1, (json.dumps(values) + "\n").encode())


def main() -> None:
    task = json.loads(sys.argv[1])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    say(report(task))
    heard, looked, told, text = time.monotonic(), 0.0, -1, b""
    while time.monotonic() - heard < SILENCE_SECONDS:
        if select.select([0], [], [], LOOK_SECONDS)[0]:
            piece = os.read(0, 4096)
            if not piece:
                break
            heard, text = time.monotonic(), text + piece
        *words, text = text.split(b"\n")
        if b"end" in words:
            break
        if b"stop" in words:
            send(ranks(task["mark"]), signal.SIGUSR1)
        if time.monotonic() - looked >= LOOK_SECONDS:
            looked, count = time.monotonic(), len(ranks(task["mark"]))
            if count != told:
                told = count
                say({"ranks": count})
    say({"ended": end(task["mark"])})


if __name__ == "__main__":
    main()
