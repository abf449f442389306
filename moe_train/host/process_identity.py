"""Identity of a process across hosts, restarts and containers: whether the one that is meant has ended."""

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from moe_train.host.processes import exists, status

_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")
_NO_JOB = ("", "none")  # torchrun's run id if nobody gave one


@dataclass(frozen=True)
class ProcessIdentity:
    """Identity of a process.

    Attributes:
        host: Name of the host, for messages.
        boot: Identity of the host since it was started; empty: not known.
        pid_namespace: Namespace in which the pid counts: containers have their own; empty: not known.
        pid: Number of the process.
        started: Clock ticks from the start of the host to the start of the process, because pids are used again.
        job: Number of the job of the cluster's scheduler; empty: there is none.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: int
    job: str = ""

    @classmethod
    def own(cls) -> Self:
        """Return the identity of this process."""
        boot = namespace = ""
        with contextlib.suppress(OSError):  # a sandbox without them: then only heartbeats tell
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        found = status(os.getpid())
        return cls(socket.gethostname(), boot, namespace, os.getpid(), found.started if found else 0, _job())

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make an identity from the plain values of `as_dict`.

        Raises:
            ValueError: If a value is missing or of another type.
        """
        found = {field.name: values.get(field.name) for field in fields(cls)}
        if any(type(value) is not (int if name in ("pid", "started") else str) for name, value in found.items()):
            raise ValueError(f"not the identity of a process: {found}")
        return cls(**found)  # type: ignore[arg-type]  # checked above

    @classmethod
    def parse(cls, text: str | bytes) -> Self | None:
        """Read an identity from the text that `str` gives; None if it is none."""
        try:
            return cls.of(json.loads(text))
        except (ValueError, AttributeError):
            return None

    def __str__(self) -> str:
        return json.dumps(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def shares_pids(self, other: "ProcessIdentity") -> bool:
        """Return whether two processes see each other's pid: the same host, start of it, and namespace of pids."""
        place, other_place = ((each.host, each.boot, each.pid_namespace) for each in (self, other))
        return place == other_place and all(place)

    def has_ended(self, here: "ProcessIdentity") -> bool:
        """Return whether the process has certainly ended; False if that cannot be known.

        Only a process that sees the same pids can tell.

        Args:
            here: Identity of this process.
        """
        if not self.shares_pids(here):
            return False
        if (found := status(self.pid)) is None:
            return not exists(self.pid)
        return found.is_dead or found.started != self.started

    def describe(self) -> str:
        """Describe the process in a clause: host, pid, and job if there is one."""
        return f"host {self.host}, pid {self.pid}" + (f", job {self.job}" if self.job else "")


def _job() -> str:
    found = (os.environ.get(name, "") for name in _JOB_VARIABLES)
    return next((job for job in found if job not in _NO_JOB), "")
