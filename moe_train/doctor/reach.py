"""Whether each host reaches each other one by TCP, with large messages too, and how far their clocks are apart.

Before any process group is formed: that needs every link, and says of a broken one only that it took too long. Each
host's first rank answers whoever connects, in threads, and goes to all other hosts itself.
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

LARGE_BYTES = 256 * 1024  # many packets of any size that networks have
_PACKET_BYTES = 8000  # one packet where an interface has jumbo frames, which a switch on the way may not pass on
# Linux finds a smaller packet size by itself when full packets are lost, seconds later, and for each connection anew.
_LARGE_SECONDS = 1.0  # for LARGE_BYTES: 2 Mbit/s
_AT_ONCE = 16  # connections
_TIMES = 5  # that a clock is asked for
_REQUEST = struct.Struct("!BI")  # kind, number of bytes
_UP, _DOWN, _CLOCK = 1, 2, 3
_CLOCK_ANSWER = struct.Struct("!d")


@dataclass(frozen=True)
class Reach:
    """How one host met another.

    Attributes:
        node: The other host.
        failure: Why not; "".
        round_trip_seconds: Of the shortest message.
        clock_seconds: By how much the other's clock is ahead of this one's.
        clock_error_seconds: Either way.
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
        address: Of this host.

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
    with connection, contextlib.suppress(OSError):  # the one who asked notices
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
    """Go to every other host, to the next one first, so that not all go to the same one at once.

    Args:
        node: This host.
        addresses: Of every host: address and port of its `answering`.
        seconds: For each of them.
    """
    others = [(node + step) % len(addresses) for step in range(1, len(addresses))]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(lambda other: reach(other, addresses[other], seconds), others))


def reach(node: int, address: tuple[str, int], seconds: float) -> Reach:
    """Connect, send and receive a small and a large message, and ask for the time.

    Args:
        node: The other host.
        address: And port.
        seconds: For everything.
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
    """Seconds of the round trip, and by how much the other clock is ahead if both ways took the same."""
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
    """At which the other hosts reach this one: of the interface that gloo takes, or of the route to rank 0.

    Args:
        interface: That gloo takes; None: not known.
        master_addr: Of rank 0's host.
    """
    addresses = interface_addresses()
    if interface in addresses:
        return addresses[interface]
    return addresses.get(route_interface(master_addr) or "", LOOPBACK)
