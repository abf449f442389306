"""Hostfile of a cluster, as deepspeed, Open MPI and Kubernetes' mpi-operator write it: a line per host.

A line is `NAME slots=N`, or `NAME:N` as for MPICH. `USER@NAME` names the user for ssh. `max_slots=N` and a note that
begins with # may follow.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.errors import UsageError

_EXAMPLE = "a line is like: worker-0 slots=8"
_USER = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class HostLine:
    """One host of a hostfile.

    Attributes:
        name: Name of the host, as ssh knows it.
        slots: Number of ranks on the host.
        place: File and line, for messages.
        user: User for ssh; None: as ssh's configuration says.
    """

    name: str
    slots: int
    place: str
    user: str | None = None

    @property
    def target(self) -> str:
        """Target for ssh: the host, with the user if there is one."""
        return self.name if self.user is None else f"{self.user}@{self.name}"


def read_hostfile(path: Path) -> list[HostLine]:
    """Read the hosts of a hostfile, in their order.

    Args:
        path: The hostfile.

    Raises:
        UsageError: If the file cannot be read, or a line has another format; with file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # without the mark that Windows' editors write
    except (OSError, ValueError) as error:
        raise UsageError(f"--hostfile {path}: cannot be read: {error}") from error
    hosts: list[HostLine] = []
    for number, line in enumerate(lines, start=1):
        host = _read_line(line, f"--hostfile {path}, line {number}")
        if host is None:
            continue
        if (twice := next((each for each in hosts if each.name == host.name), None)) is not None:
            raise UsageError(f"{host.place}: {host.name} stands in {twice.place.rpartition(', ')[2]} already")
        hosts.append(host)
    if not hosts:
        raise UsageError(f"--hostfile {path}: names no host; {_EXAMPLE}")
    return hosts


def _read_line(line: str, place: str) -> HostLine | None:
    """Read a line; None if it names no host."""
    words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
    if not words:
        return None
    first, *rest = words
    if not rest and (short := re.fullmatch(r"([^:]+):([^:]*)", first)):  # host:N
        first, rest = short[1], [f"slots={short[2]}"]
    settings = dict(word.split("=", 1) for word in rest if "=" in word)
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    if len(settings) != len(rest) or "slots" not in settings or not settings.keys() <= {"slots", "max_slots"}:
        raise UsageError(f"{place} ({line.strip()!r}): must be a name and slots=N; {_EXAMPLE}")
    slots, most = (_whole(settings.get(name), name, place) for name in ("slots", "max_slots"))
    assert slots is not None, "it is among the settings"
    if most is not None and most < slots:
        raise UsageError(f"{place}: slots ({slots}) must be at most max_slots ({most})")
    match = re.fullmatch(rf"(?:({_USER})@)?({_NAME})", first)
    if match is None:
        hint = "an IPv6 address needs a name in /etc/hosts or ~/.ssh/config" if first.count(":") > 1 else _EXAMPLE
        raise UsageError(f"{place}: {first!r} is no host name; {hint}")
    return HostLine(match[2], slots, place, match[1])


def _whole(text: str | None, name: str, place: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise UsageError(f"{place}: {name} ({text!r}) must be a whole number of at least 1; {_EXAMPLE}")
    return int(text)
