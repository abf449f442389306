"""deepspeed on this machine, as `make train` starts it: stopped in order, ended with `make`, with a telling exit code.

    python -m moe_train.launch.local --parent PID -- [OPTIONS OF DEEPSPEED] launch/train.py [ARGUMENTS]

deepspeed alone returns 256 - N for a rank that signal N has killed, 0 if its own launcher was killed, and leaves its
ranks running if it is killed itself.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from moe_train.config.errors import EXIT_LOST, EXIT_STOPPED
from moe_train.distributed.addresses import free_port
from moe_train.distributed.rendezvous import LAUNCH_OWNER, RANK_ENDED
from moe_train.host.process_identity import ProcessIdentity
from moe_train.host.processes import end_processes, environment_of, processes_with, status

_LOOK_SECONDS = 0.3
_END_SECONDS = 30.0  # for the ranks to end after deepspeed has
_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class LocalLaunch:
    """Launch of deepspeed on this machine.

    Args:
        command: Command of deepspeed.
        parent: Process that this process belongs to: everything ends with it.
    """

    def __init__(self, command: Sequence[str], parent: int) -> None:
        self._command, self._parent = command, parent
        self._variable = f"{LAUNCH_OWNER}={ProcessIdentity.own()}"
        self._stops: list[int] = []
        self._is_lost = False

    def run(self) -> int:
        """Start deepspeed, wait until it and its ranks have ended, and return an exit code of the trainer."""
        for number in _STOPS:
            signal.signal(number, self._note_stop)
        signal.signal(RANK_ENDED, self._note_end)
        # Ctrl-C reaches deepspeed's launcher too, which stops the ranks. deepspeed itself must wait for it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        name, _, mark = self._variable.partition("=")
        deepspeed = subprocess.Popen(self._command, env={**os.environ, name: mark})
        handled = 0
        while deepspeed.poll() is None:
            if os.getppid() != self._parent:
                end_processes(self._started())
                return EXIT_LOST
            if len(self._stops) > handled:
                handled = len(self._stops)
                self._hand_on(handled > 1)
            time.sleep(_LOOK_SECONDS)
        deadline = time.monotonic() + _END_SECONDS
        while self._started() and time.monotonic() < deadline and os.getppid() == self._parent:
            time.sleep(_LOOK_SECONDS)
        end_processes(self._started())
        return self._code(deepspeed.returncode)

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self._stops.append(number)

    def _note_end(self, number: int, frame: FrameType | None) -> None:
        self._is_lost = True

    def _started(self) -> list[int]:
        """Find the processes that belong to this launch."""
        return [pid for pid in processes_with(self._variable) if pid != os.getpid()]

    def _hand_on(self, at_once: bool) -> None:
        """Stop the ranks: they save and end. Without ranks, or the second time, end everything."""
        started = self._started()
        ranks = [pid for pid in started if is_rank(pid)]
        if at_once or not ranks:
            end_processes(started)
            return
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    def _code(self, code: int) -> int:
        """Translate deepspeed's exit code."""
        number = -code if code < 0 else 256 - code if code > 192 else 0  # the signal that ended deepspeed or a rank
        if self._stops and (number or code == 0):
            return EXIT_STOPPED if code else 0
        return EXIT_LOST if number or (code == 0 and self._is_lost) else code


def is_rank(pid: int) -> bool:
    """Return whether a process is a rank, and not a process that a rank has started."""
    found = status(pid)
    return _has_rank(pid) and found is not None and not _has_rank(found.parent)


def _has_rank(pid: int) -> bool:
    return any(word.startswith(b"RANK=") for word in environment_of(pid))


def main(arguments: Sequence[str]) -> int:
    """Run the launch."""
    parser = argparse.ArgumentParser(prog="python -m moe_train.launch.local")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    python = Path(sys.executable)
    deepspeed = [str(python), str(python.with_name("deepspeed")), "--log_level", "critical"]
    code = LocalLaunch([*deepspeed, "--master_port", str(free_port()), *words], options.parent).run()
    if code == EXIT_LOST:
        print(f"a rank or the launcher was lost: exit code {code}; the same command goes on", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
