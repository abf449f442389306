"""Handle of a rank's sentinel: the process that outlives the rank's launcher and the rank, and speaks of their ends."""

import atexit
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from moe_train.distributed.rendezvous import LAUNCH_OWNER
from moe_train.host.control_groups import count_memory_kills
from moe_train.liveness.sentinel_process import Task

_ROOT = str(Path(__file__).resolve().parents[2])  # the folder of the package
_PROGRAM = f"import sys; sys.path.insert(0, {_ROOT!r}); from moe_train.liveness.sentinel_process import main; main()"
# The variable in which each launcher writes a rank, and one that it alone sets.
_RANKS = (
    ("torchrun", "RANK", "TORCHELASTIC_RUN_ID"),
    ("deepspeed", "RANK", "CROSS_RANK"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_ID"),
)


class RankSentinel:
    """Handle of the sentinel; without one, it does nothing. Create it with `start_sentinel`."""

    def __init__(self, process: "subprocess.Popen[bytes] | None") -> None:
        self._process = process

    def tell(self, **facts: str | bool | None) -> None:
        """Tell the sentinel what it needs to know of the run: fields of `Task`."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # somebody has ended it: the rank goes on without it
                self._process.stdin.write(json.dumps(facts).encode() + b"\n")
                self._process.stdin.flush()

    def tell_run_folder(self, log: Path | None, checkpoints: Path) -> None:
        """Tell where the rank's log is, if there is one yet, and the checkpoints."""
        self.tell(log=None if log is None else str(log.absolute()), checkpoints=str(checkpoints.absolute()))

    @property
    def pid(self) -> int | None:
        """Process id of the sentinel; None: there is none."""
        return self._process.pid if self._process is not None else None

    def leave(self) -> None:
        """Tell that this rank ends as planned. The sentinel ends when the rank has ended."""
        self.tell(is_leaving=True)


def start_sentinel(environ: Mapping[str, str]) -> RankSentinel:
    """Start the sentinel of this process, if a known launcher has started it as a rank, on Linux.

    Call it in the rank's first lines: it takes the parent of this process for its launcher.

    Args:
        environ: Environment variables of this process.
    """
    parent = os.getppid()
    found = next(((who, environ[rank]) for who, rank, own in _RANKS if rank in environ and own in environ), None)
    if found is None or not sys.platform.startswith("linux"):
        return RankSentinel(None)
    launcher, rank = found
    owner, kills = environ.get(LAUNCH_OWNER, ""), count_memory_kills()
    task = Task(os.getpid(), parent, f"rank {rank}", launcher, owner, kills)
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, json.dumps(asdict(task))]
    sentinel = RankSentinel(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
    atexit.register(sentinel.leave)
    return sentinel
