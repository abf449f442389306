"""Process beside each rank: it ends the rank when its launcher is gone, and says so when the rank itself was killed.

It is a program of its own, of the standard library alone. A thread of the rank would wait wherever a library holds the
interpreter's lock (loading torch, MPI_Init), and a rank that got SIGKILL cannot speak for itself.

It takes one argument, a JSON object with the fields of `Task`. On its standard input, the rank writes one JSON object
per line: `log` and `checkpoints`, once the run folder is known, and `is_leaving`, before it ends as planned. The
process ends with its rank. It stays in the rank's process group, so that it notices what signals the rank gets.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from moe_train.distributed.rendezvous import RANK_ENDED
from moe_train.host.processes import (
    Watched,
    command_line,
    descendants,
    end_processes,
    is_of_this_host,
    process_mark,
    status,
)

# Programs that start ranks, as words of a command line. A process above a launcher belongs to it if its command line
# has such a word: deepspeed's front end, a shell that runs a launcher, mpirun above its proxy, `make`.
_LAUNCHERS = re.compile(
    r"(^|[/ ])(deepspeed|deepspeed\.launcher\.\w+|torchrun|torch\.distributed\.\w+|accelerate|mpirun\S*|mpiexec\S*|"
    r"prterun|prted?|orted|orterun|hydra\S*|slurmstepd\S*|srun|make|gmake|moe-train|moe_train\S*)([ :;]|$)"
)
# These adopt processes whose parent has ended. They start no rank themselves.
_ADOPTERS = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit")
_MOST_ANCESTORS = 32
_LOOK_SECONDS = 1.0
# From the launcher's end to the rank's. Ctrl-C reaches deepspeed's front end, which ends, and the ranks, which save.
_PAUSE_SECONDS, _STOP_SECONDS = 1.0, 25.0


@dataclass
class Task:
    """Task of the process.

    Attributes:
        pid: Process id of the rank.
        parent: Process id of the rank's parent, from the rank's first lines.
        name: Name of the rank in messages, such as "rank 1".
        launcher: Name of the launcher in messages, such as "torchrun".
        owner: Mark of the process that started the launcher, from `process_mark`; "": none is known.
        log: The rank's log; None until the run folder is known.
        checkpoints: Folder of checkpoints; None until the run folder is known.
        is_leaving: Whether the rank is about to end as planned.
    """

    pid: int
    parent: int
    name: str
    launcher: str
    owner: str = ""
    log: str | None = None
    checkpoints: str | None = None
    is_leaving: bool = False


def launcher_chain(parent: int) -> list[Watched] | None:
    """Find the processes that make up a rank's launcher.

    Args:
        parent: Parent of the rank.

    Returns:
        The parent, and the launchers above it; None if the launcher is gone already.
    """
    if is_adopter(parent):
        return None
    found, pid = list[Watched](), parent
    while len(found) < _MOST_ANCESTORS:
        watched, line = Watched.of(pid), command_line(pid)
        if watched is None:
            return None
        found.append(watched)
        is_child = "deepspeed.launcher.launch" in line  # of deepspeed's front end, or of a shell under sshd
        current = status(pid)
        pid = current.parent if current is not None else 0
        if is_child and is_adopter(pid):
            return None
        above = command_line(pid)
        if pid <= 1 or not (_LAUNCHERS.search(above) or (is_child and above.startswith("sshd"))):
            break
    return found


def is_adopter(pid: int) -> bool:
    """Return whether a process is none that starts ranks: it has adopted them after the end of their parent."""
    if pid <= 0:
        return True
    line = command_line(pid)
    if Path(line.partition(" ")[0]).name in _ADOPTERS:
        return True
    return pid == 1 and _LAUNCHERS.search(line) is None  # in a container, process 1 may be the launcher


def count_memory_kills() -> int | None:
    """Return how many processes the kernel has killed for lack of memory since the boot; None if it does not tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def describe_signal(number: int, memory_kills: int | None) -> str:
    """Describe the end of a rank by a signal.

    Args:
        number: Number of the signal; 0: unknown.
        memory_kills: Processes that the kernel killed for lack of memory while the rank lived; None: unknown.
    """
    if number not in (0, signal.SIGKILL):
        return f"was ended by signal {number} ({signal.Signals(number).name})"
    reason = "often for lack of memory"
    if memory_kills is not None:
        reason = "by the kernel, for lack of memory" if memory_kills else "not by the kernel for lack of memory"
    if number == 0:
        return f"is gone without a word, as after signal 9 (SIGKILL; {reason})"
    return f"was killed by signal 9 (SIGKILL; {reason})"


def describe_checkpoint(folder: str | None) -> str:
    """Describe from where the same command goes on."""
    if folder is None:
        return "it had not opened its run folder"
    try:
        latest = Path(folder, "latest").read_text().strip()
    except OSError:
        return "there is no checkpoint yet"
    return f"last checkpoint: step {int(latest.rpartition('_')[2])}" if latest[-1:].isdecimal() else latest


@dataclass
class Sentinel:
    """State of this process.

    Attributes:
        task: Task, to which the rank adds.
        owner: Process that started the launcher; None: not known.
        stopped: Last signal that this process got together with its rank.
        memory_kills: Kills for lack of memory before the rank began.
    """

    task: Task
    owner: Watched | None = None
    stopped: signal.Signals | None = None
    memory_kills: int | None = field(default_factory=count_memory_kills)
    _unread: bytes = b""

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, as a handler of signals."""
        self.stopped = signal.Signals(number)

    def hear(self) -> bool:
        """Read what the rank says; return whether it can say more."""
        piece = os.read(0, 65536)
        *lines, self._unread = (self._unread + piece).split(b"\n")
        for line in lines:
            for name, value in json.loads(line).items():
                setattr(self.task, name, value)
        return bool(piece)

    def hear_last_words(self) -> None:
        """Read what the rank has said and this process has not read yet; wait for nothing."""
        while select.select([0], [], [], 0)[0] and self.hear():
            pass

    def say(self, text: str) -> None:
        """Write a line to the terminal and to the rank's log."""
        task = self.task
        line = (
            f"{task.name} (pid {task.pid} on {socket.gethostname()}) {text}; {describe_checkpoint(task.checkpoints)}\n"
        )
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, line.encode())
        if task.log is not None:
            with contextlib.suppress(OSError), open(task.log, "a", encoding="utf-8") as log:
                log.write(line)

    def report_end(self, exit_status: int | None) -> None:
        """Say how the rank ended, unless it has said so itself.

        Args:
            exit_status: As of os.wait; None: its launcher has taken it already.
        """
        if exit_status is None and (self.task.is_leaving or self.stopped is not None):
            return
        number = 0 if exit_status is None else exit_status & 0x7F
        if exit_status is not None and number in (0, self.stopped):
            return  # as it was told to: who sent the signal knows
        before, now = self.memory_kills, count_memory_kills()
        text = describe_signal(number, None if before is None or now is None else now - before)
        if self.stopped is not None:
            text += f" after {self.stopped.name}"
        self.say(text)

    def end_rank(self) -> None:
        """End the rank and all that it has started, but for this process."""
        self.say(f"is ended, because its launcher ({self.task.launcher}) is gone")
        if self.owner is not None:
            with contextlib.suppress(OSError):  # it is the launcher that is gone
                os.kill(self.owner.pid, RANK_ENDED)
        end_processes(pid for pid in [self.task.pid, *descendants(self.task.pid)] if pid != os.getpid())


def watch(sentinel: Sentinel, rank: Watched, launchers: list[Watched]) -> None:
    """Return when the rank has ended, or was ended because one of the launchers has."""
    poll, hears = select.poll(), True
    poll.register(0, select.POLLIN)
    for each in (rank, *launchers):
        if each.descriptor is not None:
            poll.register(each.descriptor, select.POLLIN)
    gone_at = None
    while True:
        events = dict(poll.poll(int(1000 * _LOOK_SECONDS)))
        if hears and 0 in events:
            hears = sentinel.hear()
            if not hears:
                poll.unregister(0)
        if rank.has_ended:
            found = status(rank.pid)
            sentinel.hear_last_words()
            sentinel.report_end(found.exit_status if found is not None and found.started == rank.started else None)
            return
        if gone_at is None and any(each.has_ended for each in launchers):
            gone_at = time.monotonic()
            for each in launchers:
                if each.descriptor is not None:
                    poll.unregister(each.descriptor)  # else it would wake this process without end
        is_stopping = sentinel.stopped is not None
        if gone_at is not None and time.monotonic() - gone_at >= (_STOP_SECONDS if is_stopping else _PAUSE_SECONDS):
            sentinel.end_rank()
            return


def main() -> None:
    """Run the process."""
    sentinel = Sentinel(Task(**json.loads(sys.argv[1])))
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, sentinel.note)
    task = sentinel.task
    rank = Watched.of(task.pid)
    if rank is None:
        sentinel.hear_last_words()
        sentinel.report_end(None)
        return
    launchers, current = launcher_chain(task.parent), status(task.pid)
    is_orphan = launchers is None or (current is not None and current.parent != task.parent)
    if task.owner and is_of_this_host(task.owner) and launchers is not None:
        sentinel.owner = owner = Watched.of(int(task.owner.split()[0]))
        if owner is None or process_mark(owner.pid) != task.owner:
            is_orphan, sentinel.owner = True, None
        else:
            launchers.append(owner)
    if launchers is None or is_orphan:
        sentinel.end_rank()
    else:
        watch(sentinel, rank, launchers)
