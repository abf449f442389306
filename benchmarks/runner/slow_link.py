"""Nodes on one machine, joined by a slow link: network namespaces on a bridge, every node's line limited in rate.

    with slow_link(num_nodes=2, mbit=200) as nodes:
        ranks = [subprocess.Popen([*node.prefix, sys.executable, "rank.py"], env=...) for node in nodes]
        ...

A node is a network of its own and nothing more: files, processes and memory are those of the machine. Between processes
of one node bytes go through its loopback, as fast as ever. For gloo, which else looks for the address of the host's
name, GLOO_SOCKET_IFNAME must name the node's interface. Needs root, iproute2, and a kernel whose traffic control has a
queueing discipline with a rate; SlowLinkUnavailable says what is missing.
"""

import contextlib
import math
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FrameType

from benchmarks.runner.namespaces import (
    answer_of,
    command_path,
    left_over,
    namespaces_of,
    remove_namespaces,
    run_command,
)

INTERFACE = "eth0"  # of every node
SUBNET = "198.18.0"  # of the range that RFC 2544 sets aside for benchmarks
MOST_NODES = 250
NAME_PREFIX = "moe-train-slow-link"  # of namespaces; the process's id and random digits follow
# A line that was idle sends this much at once: small, or a short message would not be slowed.
_BURST_SECONDS, _LEAST_BURST_BYTES = 1e-3, 16 * 1024
# What waits for the line: TCP keeps to much less by itself, and a packet that is dropped costs a retransmission.
_QUEUE_SECONDS, _LEAST_QUEUE_BYTES = 0.2, 4 * 2**20
_PACKET_BYTES = 1500


class SlowLinkUnavailable(RuntimeError):
    """This machine cannot make the nodes; with what is missing."""


@dataclass(frozen=True)
class Node:
    """One of the nodes.

    Attributes:
        rank: From 0.
        namespace: Its network namespace, as `ip netns list` tells it.
        prefix: What comes before a command that is to run in it.
        address: IPv4 address of its interface.
        interface: Name of its interface, for GLOO_SOCKET_IFNAME and the like.
    """

    rank: int
    namespace: str
    prefix: tuple[str, ...]
    address: str
    interface: str


@dataclass(frozen=True)
class _Line:
    """What a node's line lets through.

    Attributes:
        mbit: Megabits per second.
        delay_ms: Milliseconds that it takes besides.
    """

    mbit: float
    delay_ms: float

    def disciplines(self) -> list[list[str]]:
        """The queueing disciplines that can do it, as `tc qdisc` takes them, the better one first."""
        bytes_per_second = self.mbit * 1e6 / 8
        burst = math.ceil(max(_LEAST_BURST_BYTES, bytes_per_second * _BURST_SECONDS))
        queue = math.ceil(max(_LEAST_QUEUE_BYTES, bytes_per_second * (_QUEUE_SECONDS + self.delay_ms / 1e3)))
        rate = ["rate", f"{math.ceil(self.mbit * 1e6)}bit"]
        netem = ["netem", *rate, "limit", str(math.ceil(queue / _PACKET_BYTES))]
        if self.delay_ms:
            return [[*netem, "delay", f"{self.delay_ms * 1e3:.0f}us"]]
        return [["tbf", *rate, "burst", f"{burst}b", "limit", f"{queue}b"], netem]


@contextlib.contextmanager
def slow_link(num_nodes: int, mbit: float, delay_ms: float = 0.0) -> Iterator[list[Node]]:
    """Nodes for the time of a block. What still runs in them at its end is killed, and nothing of them is left.

    That is so after an error and after SIGTERM too, which becomes SystemExit; a handler of the caller's own must raise
    something as well. After SIGKILL they stay, until the next use on this machine.

    Args:
        num_nodes: 1 or more.
        mbit: Megabits per second that a node can send and, at the same time, receive, headers of packets included.
        delay_ms: Milliseconds by which what a node sends is late; needs the kernel's netem.

    Yields:
        The nodes, in order.

    Raises:
        ValueError: An argument makes no sense.
        SlowLinkUnavailable: They cannot be made here.
    """
    if not 1 <= num_nodes <= MOST_NODES:
        raise ValueError(f"num_nodes ({num_nodes}) must be 1 to {MOST_NODES}")
    if not 0 < mbit < math.inf:
        raise ValueError(f"mbit ({mbit:g}) must be more than 0")
    if not 0 <= delay_ms < math.inf:
        raise ValueError(f"delay_ms ({delay_ms:g}) must be 0 or more")
    ip, tc = _find_commands()
    name = f"{NAME_PREFIX}-{os.getpid()}-{secrets.token_hex(3)}"
    with _ended_by_sigterm():
        try:
            remove_namespaces(left_over(NAME_PREFIX))
            yield _put_up(ip, tc, name, num_nodes, _Line(mbit, delay_ms))
        finally:
            with _undisturbed():
                remove_namespaces(namespaces_of(name))


def _find_commands() -> tuple[str, str]:
    """The paths of ip and tc."""
    if not sys.platform.startswith("linux"):
        raise SlowLinkUnavailable(f"network namespaces are Linux's, and this is {sys.platform}")
    if os.geteuid() != 0:
        raise SlowLinkUnavailable(f"only root can make network namespaces, and this is user {os.geteuid()}")
    found = [shutil.which(name, path=command_path()) for name in ("ip", "tc")]
    missing = [name for name, path in zip(("ip", "tc"), found, strict=True) if path is None]
    if missing:
        raise SlowLinkUnavailable(f"no command {' and no command '.join(missing)}: install iproute2")
    return str(found[0]), str(found[1])


def _put_up(ip: str, tc: str, name: str, num_nodes: int, line: _Line) -> list[Node]:
    """The nodes, each with a line to a bridge. The bridge has a namespace too: the machine's network is not touched."""
    switch = f"{name}-switch"
    _need("network namespaces are not allowed here", ip, "netns", "add", switch)
    _need("this kernel has no bridges", ip, "-n", switch, "link", "add", "bridge0", "type", "bridge")
    _need("a bridge cannot be used here", ip, "-n", switch, "link", "set", "bridge0", "up")
    nodes = []
    for rank in range(num_nodes):
        namespace, port = f"{name}-node{rank}", f"node{rank}"
        node = Node(rank, namespace, (ip, "netns", "exec", namespace), f"{SUBNET}.{rank + 1}", INTERFACE)
        _need("network namespaces are not allowed here", ip, "netns", "add", namespace)
        pair = ("link", "add", INTERFACE, "netns", namespace, "type", "veth", "peer", "name", port, "netns", switch)
        _need("this kernel has no pairs of virtual interfaces (veth)", ip, *pair)
        for where, *change in (
            (switch, "link", "set", port, "master", "bridge0", "up"),
            (namespace, "link", "set", "lo", "up"),
            (namespace, "addr", "add", f"{node.address}/24", "dev", INTERFACE),
            (namespace, "link", "set", INTERFACE, "up"),
        ):
            _need("a network namespace cannot be set up here", ip, "-n", where, *change)
        # Both ends of the line: with more than two nodes, several may send to one.
        _limit(tc, namespace, INTERFACE, line)
        _limit(tc, switch, port, replace(line, delay_ms=0.0))  # or it would be late twice
        nodes.append(node)
    _need("no command can be run in a network namespace here", *nodes[0].prefix, "true")
    return nodes


def _limit(tc: str, namespace: str, interface: str, line: _Line) -> None:
    """Limit what an interface sends, with the first queueing discipline that the kernel has."""
    answers = []
    for discipline in line.disciplines():
        result = run_command(tc, "-n", namespace, "qdisc", "replace", "dev", interface, "root", *discipline)
        if result.returncode == 0:
            return
        answers.append(f"{discipline[0]} ({answer_of(result)})")
    what = "a rate and a delay" if line.delay_ms else "a rate"
    raise SlowLinkUnavailable(f"this kernel has no queueing discipline with {what}: tried {', '.join(answers)}")


def _need(otherwise: str, *command: str) -> None:
    """Run a command without which there are no nodes.

    Args:
        otherwise: What it means when it fails.
        command: To run.
    """
    result = run_command(*command)
    if result.returncode:
        raise SlowLinkUnavailable(f"{otherwise}: `{' '.join(command)}` says: {answer_of(result)}")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM becomes SystemExit, which passes through every `finally`; unless the caller handles it."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    is_ours = _is_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put SIGINT and SIGTERM off until the end of the block."""
    if not _is_main_thread():  # Python's handlers run in the main thread only
        yield
        return
    held: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in signals}
    try:
        yield
    finally:
        for disturbance, handler in before.items():
            signal.signal(disturbance, handler)
        for number in held:
            signal.raise_signal(number)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
