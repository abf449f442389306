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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moe_train.distributed.rendezvous import RANK_ENDED
from moe_train.host.control_groups import count_memory_kills
from moe_train.host.process_identity import ProcessIdentity
from moe_train.host.processes import Watched, arguments_of, descendants, end_processes, status

# Programs that start ranks. A process above a launcher belongs to it if it is one of them, such as deepspeed's front
# end, mpirun above its proxy, or `make`.
_NAMES = (
    r"deepspeed|deepspeed\.launcher\.\w+|torchrun|torch\.distributed\.\w+|accelerate|mpirun\S*|mpiexec\S*|"
    r"prterun|prted?|orted|orterun|hydra\S*|slurmstepd\S*|srun|make|gmake|moe-train|moe_train\S*"
)
_LAUNCHERS, _NAMED_LAUNCHERS = re.compile(_NAMES), re.compile(rf"(^|[/ ])({_NAMES})([ :;]|$)")
_DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"  # child of deepspeed's front end, or of a shell under sshd
_SHELLS = ("sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "csh", "tcsh", "fish", "busybox")
_BACKGROUND = re.compile(r"(?<![&><|\\])&(?![&>])")
# These adopt processes whose parent has ended. They start no rank themselves, but for a container's first process.
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
        owner: Identity of the process that started the launcher, as text; "": none is known.
        memory_kills: Kills for lack of memory in the rank's control group before its first lines; None: unknown.
        log: The rank's log; None until the run folder is known.
        checkpoints: Folder of checkpoints; None until the run folder is known.
        is_leaving: Whether the rank is about to end as planned.
    """

    pid: int
    parent: int
    name: str
    launcher: str
    owner: str = ""
    memory_kills: int | None = None
    log: str | None = None
    checkpoints: str | None = None
    is_leaving: bool = False


def launcher_chain(rank: int, parent: int, launcher: str) -> list[Watched] | None:
    """Find the processes that make up a rank's launcher.

    Args:
        rank: Process id of the rank.
        parent: Parent of the rank; 0: it is outside of the rank's container.
        launcher: Name of the launcher.

    Returns:
        The parent, and the launchers above it, as far as they can be seen; None if the launcher is certainly gone.
    """
    found, child, pid, is_launch = list[Watched](), rank, parent, False
    while pid > 0 and len(found) < _MOST_ANCESTORS:
        words = arguments_of(pid)
        program = program_of(words)
        if (child == rank or is_launch) and was_adopted(child, pid, launcher):
            return None
        is_sshd = is_launch and program.startswith("sshd")
        if child == rank or is_sshd or _LAUNCHERS.fullmatch(program):
            watched = Watched.of(pid)
            if watched is None:
                return None
            found.append(watched)
        elif not waits_for_launcher(words):
            break
        is_launch = program == _DEEPSPEED_LAUNCH or (is_launch and program in _SHELLS)
        current = status(pid)
        child, pid = pid, current.parent if current is not None else 0
    return found


def waits_for_launcher(words: Sequence[str]) -> bool:
    """Return whether a command line is that of a shell that starts a launcher and waits for it, as in a recipe of make.

    The end of such a shell alone is no reason to end ranks: its launcher lives. But what is above it belongs to the
    launcher. A shell that starts anything in the background may end as planned long before the launcher.
    """
    line = " ".join(words)
    return program_of(words) in _SHELLS and bool(_NAMED_LAUNCHERS.search(line)) and not _BACKGROUND.search(line)


def program_of(words: Sequence[str]) -> str:
    """Return the name of the program that a command line runs; for Python, that of the script or module."""
    first, *rest = words or [""]
    name = Path(first.partition(": ")[0]).name.lstrip("-")  # "slurmstepd: [7.0]"; "-bash"
    if not name.startswith("python"):
        return name
    options = iter(rest)
    for word in options:
        if word == "-m":
            return next(options, "")
        if word in ("-W", "-X"):
            next(options, "")
        elif not word.startswith("-"):
            return Path(word).name
        elif word == "-c":
            break
    return name


def was_adopted(pid: int, parent: int, launcher: str) -> bool:
    """Return whether a process certainly has another parent than the one that started it.

    A process begins in its parent's session, and may make one of its own, as torchrun's ranks do.

    Args:
        pid: Process id of the child.
        parent: Process id of its parent now.
        launcher: Name of the launcher.
    """
    if not is_adopter(parent):
        return False
    try:
        session, parents_session = os.getsid(pid), os.getsid(parent)
    except OSError:
        return False
    if session in (0, parents_session):  # 0: a session of another namespace
        return False
    program = program_of(arguments_of(parent))
    return session != pid or (launcher == "torchrun" and program != "" and not program.startswith("python"))


def is_adopter(pid: int) -> bool:
    """Return whether a process may have adopted others after the end of their parent."""
    program = program_of(arguments_of(pid))
    return program in _ADOPTERS or (pid == 1 and not _LAUNCHERS.fullmatch(program))


def describe_signal(number: int, memory_kills: int | None) -> str:
    """Describe the end of a rank by a signal.

    Args:
        number: Number of the signal; 0: unknown.
        memory_kills: Processes of its control group that the kernel killed for lack of memory while the rank lived;
            None: unknown.
    """
    if number not in (0, signal.SIGKILL):
        name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""  # real-time signals
        return f"was ended by signal {number}{name}"
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
    """

    task: Task
    owner: Watched | None = None
    stopped: signal.Signals | None = None
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
        before, now = self.task.memory_kills, count_memory_kills()
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
        current = status(rank.pid)
        is_adopted = current is not None and current.parent != sentinel.task.parent  # the parent may be hidden
        if gone_at is None and (is_adopted or any(each.has_ended for each in launchers)):
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
    launchers, current = launcher_chain(task.pid, task.parent, task.launcher), status(task.pid)
    is_orphan = launchers is None or (current is not None and current.parent != task.parent)
    owner, here = ProcessIdentity.parse(task.owner), ProcessIdentity.own()
    if owner is not None and owner.shares_pids(here) and launchers is not None:
        sentinel.owner = Watched.of(owner.pid) if not owner.has_ended(here) else None
        if sentinel.owner is None:
            is_orphan = True
        else:
            launchers.append(sentinel.owner)
    if launchers is None or is_orphan:
        sentinel.end_rank()
    else:
        watch(sentinel, rank, launchers)
