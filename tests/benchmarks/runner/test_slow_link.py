"""Nodes out of network namespaces: what the link between them slows, and that nothing of them stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.runner.slow_link import NAME_PREFIX, Node, SlowLinkUnavailable, slow_link

ROOT = Path(__file__).resolve().parents[3]
MBIT = 40
TRANSFER_BYTES = 2 * 2**20
TIMEOUT_SECONDS = 60
RECEIVE = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
began, received = time.monotonic(), 0
while part := connection.recv(2**20):
    received += len(part)
print(received, time.monotonic() - began, flush=True)
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.sendall(bytes(int(sys.argv[3])))
"""
# Makes nodes, starts something in one that would outlive them, tells its process and waits.
HOLD = """
import subprocess, sys, time
from benchmarks.runner.slow_link import slow_link
with slow_link(2, 100) as nodes:
    print(subprocess.Popen([*nodes[1].prefix, "sleep", "300"]).pid, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def pair() -> Iterator[list[Node]]:
    """Two nodes; skips where they are not possible."""
    try:
        link = slow_link(2, MBIT)
        nodes = link.__enter__()
    except SlowLinkUnavailable as reason:
        pytest.skip(str(reason))
    try:
        yield nodes
    finally:
        link.__exit__(None, None, None)


def transfer_seconds(sender: Node, receiver: Node) -> float:
    """Of TRANSFER_BYTES by TCP, from the connection to the last byte."""
    command = [*receiver.prefix, sys.executable, "-c", RECEIVE, receiver.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiving:
        assert receiving.stdout is not None
        port = receiving.stdout.readline().strip()
        send = [*sender.prefix, sys.executable, "-c", SEND, receiver.address, port, str(TRANSFER_BYTES)]
        subprocess.run(send, check=True, timeout=TIMEOUT_SECONDS)
        received, seconds = receiving.stdout.readline().split()
    assert int(received) == TRANSFER_BYTES
    return float(seconds)


def namespaces(process: int) -> list[str]:
    """Those that a process made."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"{NAME_PREFIX}-{process}-")]


def start_holder() -> tuple[subprocess.Popen[str], int]:
    """A process that holds nodes, and the one that it started in a node."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline())


def is_gone(process: int) -> bool:
    """Whether a process has ended, at the latest in a few seconds: a zombie that nobody waits for counts as gone."""
    stat = Path(f"/proc/{process}/stat")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.cluster
def test_link_between_nodes_is_slow_and_loopback_is_not(pair: list[Node]) -> None:
    least = TRANSFER_BYTES * 8 / (MBIT * 1e6)
    assert transfer_seconds(pair[0], pair[1]) >= least
    assert transfer_seconds(pair[1], pair[0]) >= least
    inside = min(transfer_seconds(node, node) for node in pair)
    assert inside < least / 3  # measured: a twentieth


@pytest.mark.cluster
def test_nothing_stays_after_an_error(pair: list[Node]) -> None:
    with pytest.raises(KeyError), slow_link(3, MBIT) as nodes:
        assert [node.address for node in nodes] == ["198.18.0.1", "198.18.0.2", "198.18.0.3"]
        names = {node.namespace for node in nodes}
        assert len(namespaces(os.getpid())) == 4 + 3  # these and their switch; those of `pair`
        left = subprocess.Popen([*nodes[2].prefix, "sleep", "300"])
        raise KeyError
    assert left.wait(TIMEOUT_SECONDS) == -signal.SIGKILL
    remaining = namespaces(os.getpid())
    assert len(remaining) == 3 and not any(line.split()[0] in names for line in remaining)


@pytest.mark.cluster
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_nothing_stays_after_a_signal(pair: list[Node], number: signal.Signals, code: int) -> None:
    holder, inside = start_holder()
    assert len(namespaces(holder.pid)) == 3
    holder.send_signal(number)
    assert holder.wait(TIMEOUT_SECONDS) == code
    assert namespaces(holder.pid) == [] and is_gone(inside)


@pytest.mark.cluster
def test_what_a_killed_process_left_is_removed_by_the_next_use(pair: list[Node]) -> None:
    holder, inside = start_holder()
    holder.kill()
    holder.wait(TIMEOUT_SECONDS)
    assert len(namespaces(holder.pid)) == 3 and not Path(f"/proc/{holder.pid}").exists()
    with slow_link(1, MBIT):
        assert namespaces(holder.pid) == [] and is_gone(inside)
        assert len(namespaces(os.getpid())) == 2 + 3  # a living process keeps its own


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Only these commands can be found, and this user is root."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("benchmarks.runner.namespaces._FOLDERS", str(folder))
    monkeypatch.setattr("os.geteuid", lambda: 0)


def reason() -> str:
    """Why there can be no nodes."""
    with pytest.raises(SlowLinkUnavailable) as told:
        with slow_link(2, MBIT):
            pass
    return str(told.value)


def test_says_that_it_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert reason() == "only root can make network namespaces, and this is user 1000"


def test_says_which_command_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch)
    assert reason() == "no command ip and no command tc: install iproute2"
    commands(tmp_path, monkeypatch, ip="exit 0")
    assert reason() == "no command tc: install iproute2"


def test_says_that_namespaces_are_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(
        tmp_path, monkeypatch, ip='test "$2" = list || { echo mount: Operation not permitted >&2; exit 1; }', tc=""
    )
    found = reason()
    assert found.startswith("network namespaces are not allowed here: ")
    assert found.endswith("-switch` says: mount: Operation not permitted")


def test_says_which_disciplines_the_kernel_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, ip="exit 0", tc="echo unknown >&2; exit 2")
    tried = "tried tbf (unknown), netem (unknown)"
    assert reason() == f"this kernel has no queueing discipline with a rate: {tried}"
    with pytest.raises(SlowLinkUnavailable, match=r"with a rate and a delay: tried netem \(unknown\)$"):
        with slow_link(2, MBIT, delay_ms=1):
            pass


def test_takes_netem_where_there_is_no_tbf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    tc = f'case "$*" in *tbf*) exit 2;; esac; echo "$*" >> {said}'
    commands(tmp_path, monkeypatch, ip="exit 0", tc=tc)
    with slow_link(1, MBIT):
        pass
    with slow_link(1, MBIT, delay_ms=0.5):
        pass
    rates = [line.partition(" root ")[2] for line in said.read_text().splitlines()]
    plain = f"netem rate {MBIT}000000bit limit 2797"  # 4 MiB in packets of 1,500 bytes
    assert rates == [plain, plain, f"{plain} delay 500us", plain]  # a node, its port; late only once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 100.0), r"num_nodes \(0\) must be 1 to 250"),
        ((2, 0.0), r"mbit \(0\) must be more than 0"),
        ((2, float("inf")), r"mbit \(inf\) must be more than 0"),
        ((2, 1.0, -1.0), r"delay_ms \(-1\) must be 0 or more"),
    ],
)
def test_refuses_what_makes_no_sense(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message), slow_link(*arguments):
        pass
