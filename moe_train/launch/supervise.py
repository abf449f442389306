"""Supervision of a running launch: signals stop the ranks in order, and a lost host does not make the launch hang."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from moe_train.config.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USAGE
from moe_train.launch.host_agents import HostAgent

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_LOOK_SECONDS = 0.2
# Time without a rank on any host that answers, after which the launcher is ended.
_GONE_SECONDS = 2.0  # after a host was lost: the launcher would wait for it
_HANG_SECONDS = 60.0  # while all hosts answer


class Stopped(Exception):
    """Error that a signal raises before there are ranks to stop in order.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Signals that arrive while its block runs; they are recorded and do not end this process.

    Attributes:
        received: Numbers of the signals, in the order of arrival.
        are_watched: Whether `watch` reads `received`. If not, the first signal raises Stopped where the program is.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.are_watched = False

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Record signals while the block runs, except those that this process was started to ignore, as by nohup."""

        def take(number: int, frame: FrameType | None) -> None:
            self.received.append(number)
            if not self.are_watched and len(self.received) == 1:
                raise Stopped(number)

        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, take) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def start(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> list["subprocess.Popen[bytes]"]:
    """Start the launchers, each in its own process group.

    Args:
        commands: Command of each launcher.
        environment: Variables to add to this process's environment.

    Returns:
        One process per command.
    """
    return [
        subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, env={**os.environ, **environment}, start_new_session=True
        )
        for command in commands
    ]


def watch(launchers: Sequence["subprocess.Popen[bytes]"], agents: Sequence[HostAgent], signals: Signals) -> int:
    """Wait for the launchers, pass signals on to the ranks, and notice lost hosts.

    Args:
        launchers: Processes of the launchers.
        agents: Agents of all hosts.
        signals: Signals that this process receives.

    Returns:
        Exit code of the ranks. 70 if a host was lost or the launchers had to be ended. 128 plus the signal's number if
        a signal arrived before there were ranks, or a second signal arrived.
    """
    handled, said, idle_since = 0, set[str](), None
    while any(launcher.poll() is None for launcher in launchers):
        now = time.monotonic()
        for agent in agents:
            if agent.lost is not None and agent.host.name not in said:
                said.add(agent.host.name)
                _say(f"{agent.host.name} does not answer any more; its ranks are lost")
        reachable = [agent for agent in agents if agent.lost is None]
        if len(signals.received) > handled:
            handled = len(signals.received)
            name = signal.Signals(signals.received[-1]).name
            if handled > 1 or not any(agent.ranks for agent in reachable):
                _say(f"{name}: ended at once")
                return 128 + signals.received[-1]
            _say(f"{name}: the ranks finish their step and save")
            for agent in reachable:
                agent.tell("stop")
        is_idle = any(agent.has_run for agent in agents) and not any(agent.ranks for agent in reachable)
        idle_since = (idle_since or now) if is_idle else None
        if idle_since is not None and now - idle_since >= (_GONE_SECONDS if said else _HANG_SECONDS):
            _say("no rank runs any more on a host that answers, but the launcher does not end: it is ended")
            return EXIT_LOST
        time.sleep(_LOOK_SECONDS)
    return _one_code([launcher.returncode for launcher in launchers])


def _one_code(codes: Sequence[int]) -> int:
    """Choose from several agents' codes the one that says most about why they ended."""
    positive = [128 - code if code < 0 else code for code in codes]
    for code in (EXIT_USAGE, EXIT_STOPPED):
        if code in positive:
            return code
    return max(positive)


def end(launchers: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End the launchers that still run, with their process groups.

    It sends SIGKILL: on SIGTERM, deepspeed ends every deepspeed launcher on all hosts, also those of other launches.
    """
    for launcher in launchers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the error stream may have no reader any more
        print(f"moe-train launch: {text}", file=sys.stderr, flush=True)
