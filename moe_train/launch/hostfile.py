"""Hostfiles of deepspeed and Open MPI: one line `NAME slots=N` per host; a line that begins with # is a comment."""

import re
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.errors import UsageError

_EXAMPLE = "a line is like: worker-0 slots=8"


@dataclass(frozen=True)
class HostLine:
    """One host of a hostfile.

    Attributes:
        name: Name of the host, as ssh knows it.
        slots: Number of ranks on the host.
        place: File and line, for messages.
    """

    name: str
    slots: int
    place: str


def read_hostfile(path: Path) -> list[HostLine]:
    """Read the hosts of a hostfile, in their order.

    Args:
        path: The hostfile.

    Raises:
        UsageError: If the file cannot be read, or a line has another format; with file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--hostfile {path}: cannot be read: {error}") from error
    hosts: list[HostLine] = []
    for number, line in enumerate(lines, start=1):
        words, place = line.split(), f"--hostfile {path}, line {number}"
        if not words or words[0].startswith("#"):
            continue
        match = re.fullmatch(r"slots=(.*)", words[1]) if len(words) == 2 else None
        if match is None:
            raise UsageError(f"{place} ({line.strip()!r}): must be a name and slots=N; {_EXAMPLE}")
        if not (match[1].isascii() and match[1].isdecimal() and int(match[1]) > 0):
            raise UsageError(f"{place}: slots ({match[1]!r}) must be a whole number of at least 1; {_EXAMPLE}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", words[0]):
            raise UsageError(f"{place}: {words[0]!r} is no host name; {_EXAMPLE}")
        if (twice := next((host for host in hosts if host.name == words[0]), None)) is not None:
            raise UsageError(f"{place}: {words[0]} stands in {twice.place.rpartition(', ')[2]} already")
        hosts.append(HostLine(words[0], int(match[1]), place))
    if not hosts:
        raise UsageError(f"--hostfile {path}: names no host; {_EXAMPLE}")
    return hosts
