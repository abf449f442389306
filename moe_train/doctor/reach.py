"""Reachability of hosts: whether each host reaches every other one by TCP, also with large messages; clock offsets too.

It runs before any process group exists: a process group needs every link, and of a broken link it says only that it
took too long. Each host's first rank answers all connections, in threads, and connects to all other hosts itself.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moe_train.distributed.addresses import interface_addresses, route_interface
from moe_train.distributed.world import LOOPBACK

LARGE_BYTES = 256 * 1024  # many packets, whatever packet size the network has
_PACKET_BYTES = 8000  # one packet on an interface with jumbo frames, which a switch on the way may drop
# If full packets are lost, Linux finds a smaller packet size by itself, seconds later, and anew for each connection.
_LARGE_SECONDS = 1.0  # for LARGE_BYTES: 2 Mbit/s
_AT_ONCE = 16  # connections at the same time
_TIMES = 5  # clock requests per connection
_REQUEST = struct.Struct("!BI")  # kind, number of bytes
_UP, _DOWN, _CLOCK = 1, 2, 3
_CLOCK_ANSWER = struct.Struct("!d")


@dataclass(frozen=True)
class Reach:
    """Result of one host's attempt to reach another one.

    Attributes:
        node: Number of the other host.
        failure: Reason why it was not reached; "" if it was.
        round_trip_seconds: Round trip of the shortest message.
        clock_seconds: How far the other host's clock is ahead of this one's.
        clock_error_seconds: Error of clock_seconds, in either direction.
    """

    node: int
    failure: str
    round_trip_seconds: float = 0.0
    clock_seconds: float = 0.0
    clock_error_seconds: float = 0.0


@contextlib.contextmanager
def answering(address: str) -> Iterator[int]:
    """Answer requests at a free port while the block runs.

    Args:
        address: Address of this host.

    Yields:
        The port.
    """
    with socket.create_server((address, 0), backlog=128) as server:
        closed = threading.Event()

        def accept() -> None:
            while not closed.is_set():
                with contextlib.suppress(TimeoutError, OSError):
                    connection, _ = server.accept()
                    threading.Thread(target=_answer, args=(connection,), daemon=True).start()

        server.settimeout(0.2)
        thread = threading.Thread(target=accept, name="doctor's answers", daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            closed.set()
            thread.join()


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):  # the host that asked notices
        connection.settimeout(60.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            kind, num_bytes = _REQUEST.unpack(_receive(connection, _REQUEST.size))
            if kind == _UP:
                _receive(connection, num_bytes)
                connection.sendall(b"!")
            elif kind == _DOWN:
                connection.sendall(bytes(num_bytes))
            else:
                connection.sendall(_CLOCK_ANSWER.pack(time.time()))


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(min(2**16, num_bytes - len(parts)))
        if not part:
            raise ConnectionResetError("the other end closed the connection")
        parts += part
    return bytes(parts)


def reach_all(node: int, addresses: Sequence[tuple[str, int]], seconds: float) -> list[Reach]:
    """Connect to every other host, the next one first, so that not all hosts connect to the same one at once.

    Args:
        node: Number of this host.
        addresses: Address and port of each host's `answering`.
        seconds: Time for each host.

    Returns:
        One result per other host.
    """
    others = [(node + step) % len(addresses) for step in range(1, len(addresses))]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(lambda other: reach(other, addresses[other], seconds), others))


def reach(node: int, address: tuple[str, int], seconds: float) -> Reach:
    """Connect to a host, exchange a small and a large message in both directions, and ask for the time.

    Args:
        node: Number of the other host.
        address: Address and port of the other host.
        seconds: Time for everything.
    """
    deadline = time.monotonic() + seconds
    at = f"{address[0]}, port {address[1]}"
    try:
        connection = socket.create_connection(address, timeout=seconds)
    except OSError as error:
        return Reach(node, f"no connection to {at}: {_reason(error)}")
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        what = "a small message"
        try:
            clocks = [_ask_clock(connection, deadline) for _ in range(_TIMES)]
            began = time.monotonic()
            for num_bytes in (_PACKET_BYTES, LARGE_BYTES):
                what = f"{num_bytes} bytes sent to it"
                _ask(connection, _UP, num_bytes, bytes(num_bytes), 1, deadline)
                what = f"{num_bytes} bytes sent by it"
                _ask(connection, _DOWN, num_bytes, b"", num_bytes, deadline)
        except OSError as error:
            large = "" if what == "a small message" else ", though small messages do: packets of full size are dropped"
            return Reach(node, f"{what} do not arrive ({at}: {_reason(error)}){large}")
    taken = (time.monotonic() - began) / 2
    round_trip, ahead = min(clocks)
    if taken > _LARGE_SECONDS + round_trip:
        small = f"a small message {round_trip * 1e3:.2g} ms: packets of full size are dropped, or many of all"
        return Reach(node, f"{LARGE_BYTES} bytes take {taken:.1f} s ({at}), {small}")
    return Reach(node, "", round_trip, ahead, round_trip / 2)


def _ask_clock(connection: socket.socket, deadline: float) -> tuple[float, float]:
    """Return the seconds of a round trip, and how far the other clock is ahead if both directions take as long."""
    began, began_by_clock = time.perf_counter(), time.time()
    answer = _ask(connection, _CLOCK, 0, b"", _CLOCK_ANSWER.size, deadline)
    round_trip = time.perf_counter() - began
    return round_trip, _CLOCK_ANSWER.unpack(answer)[0] - (began_by_clock + round_trip / 2)


def _ask(
    connection: socket.socket, kind: int, num_bytes: int, payload: bytes, num_answered: int, deadline: float
) -> bytes:
    connection.settimeout(max(0.01, deadline - time.monotonic()))
    connection.sendall(_REQUEST.pack(kind, num_bytes) + payload)
    return _receive(connection, num_answered)


def _reason(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)


def own_address(interface: str | None, master_addr: str) -> str:
    """Find the address at which other hosts reach this one: of gloo's interface, or of the route to rank 0.

    Args:
        interface: Network interface that gloo uses; None: not known.
        master_addr: Address of rank 0's host.
    """
    addresses = interface_addresses()
    if interface in addresses:
        return addresses[interface]
    return addresses.get(route_interface(master_addr) or "", LOOPBACK)
