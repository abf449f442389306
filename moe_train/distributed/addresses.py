"""Addresses, interfaces and ports of this host at which the other ranks can meet it."""

import contextlib
import fcntl
import random
import socket
import struct
from collections.abc import MutableMapping

from moe_train.config.errors import UsageError

PROBE_SECONDS = 3.0  # for one connection within a cluster; a firewall that drops packets uses all of it
SOCKET_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # gloo reads no other variable for it
RENDEZVOUS_PORTS = (10000, 30000)  # below 32768, where Linux's ports for outgoing connections begin
_MOST_TRIES = 100
SIOCGIFADDR = 0x8915  # Linux: request for the IPv4 address of a network interface


def free_port() -> int:
    """Find a TCP port of this host that is free now, and that the system gives to no other process meanwhile.

    The system's own choices, for port 0 and for outgoing connections, are in another range: a port of that range can be
    taken by any connection until rank 0 listens.
    """
    choose = random.SystemRandom()  # two launches of one seed must differ
    for _ in range(_MOST_TRIES):
        port = choose.randrange(*RENDEZVOUS_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def interfaces() -> list[str]:
    """List the names of this host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def interface_addresses() -> dict[str, str]:
    """Return the IPv4 address of each of this host's network interfaces, by name, without loopback."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in interfaces():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])  # struct ifreq: name[16], family[2], port[2], address[4]
    return {name: address for name, address in addresses.items() if not address.startswith("127.")}


def route_interface(host: str) -> str | None:
    """Return the interface by which this host reaches another one or itself; None for loopback and unknown hosts."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing; it only looks up the route
        except OSError:
            return None
        source = probe.getsockname()[0]
    return next((name for name, address in interface_addresses().items() if address == source), None)


def interface_value(name: str, interface: str) -> str:
    """Return what a variable of SOCKET_INTERFACES holds for one interface.

    NCCL takes prefixes of names, and with "=" whole names; gloo takes whole names.

    Args:
        name: One of SOCKET_INTERFACES.
        interface: Name of the interface.
    """
    return f"={interface}" if name.startswith("NCCL") else interface


def accepts_connections(address: str, port: int) -> bool:
    """Return whether this host can connect to a port of an address."""
    try:
        socket.create_connection((address, port), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def choose_interface(setting: str | None, environ: MutableMapping[str, str]) -> None:
    """Make gloo and NCCL use a network interface. Call this before `export_world`.

    Args:
        setting: parallel.network_interface; None: the environment and `export_world` decide.
        environ: Environment variables; the two of SOCKET_INTERFACES are set.

    Raises:
        UsageError: If this host has no such interface, or a variable names another one.
    """
    if setting is None:
        return
    known = interfaces()
    if setting not in known:
        raise UsageError(
            f"parallel.network_interface ({setting!r}): host {socket.gethostname()} has none of that name; "
            f"it has {', '.join(known)}"
        )
    for name in SOCKET_INTERFACES:
        given = environ.get(name, "")
        if given and given not in (setting, interface_value(name, setting)):
            raise UsageError(
                f"parallel.network_interface ({setting!r}) contradicts {name} ({given!r}): unset one of them"
            )
        environ[name] = given or interface_value(name, setting)
