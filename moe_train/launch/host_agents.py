"""Agents of a launch, one per host. Each runs behind an ssh connection, whose end shows that the host is lost."""

import contextlib
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.launch.hostfile import HostLine

CONNECT_SECONDS, REPORT_SECONDS, END_SECONDS = 10, 40.0, 20.0
ALIVE_SECONDS = 3.0  # between two signs of life to an agent; without them, it ends the launch's processes on its host
# A host that is silent for 18 s is lost; ranks survive a shorter outage. ssh never waits for a password or a question.
SSH = (
    "ssh -o BatchMode=yes -o LogLevel=ERROR -o ServerAliveInterval=3 -o ServerAliveCountMax=6 "
    f"-o ConnectTimeout={CONNECT_SECONDS}"
).split()
_LAST_WORDS_SECONDS = 2.0  # to read ssh's error message; a process that ssh started may hold the pipe open longer
_NO_FOLDER, _NO_PYTHON, _NO_SSH = 91, 92, 255
_UNREACHABLE = ("timed out", "No route to host", "Connection refused", "Network is unreachable", "Connection reset")


def shell_command(folder: Path, words: Sequence[str]) -> str:
    """Build a command for any login shell of another host: it runs the words in a folder."""
    script = f"cd {shlex.quote(str(folder))} 2>/dev/null || exit {_NO_FOLDER}; "
    script += f"[ -x {shlex.quote(words[0])} ] || exit {_NO_PYTHON}; exec {shlex.join(words)}"
    return f"exec sh -c {shlex.quote(script)}"


@dataclass
class HostAgent:
    """Agent of one host.

    Attributes:
        host: Host of the agent.
        report: Report of the host's software and addresses; None until the agent has sent it.
        ranks: Number of ranks that run there now.
        has_run: Whether a rank has ever run there.
        lost: Time when the connection broke, in seconds of time.monotonic; None: it holds, or the launch ended it.
    """

    host: HostLine
    process: "subprocess.Popen[bytes]"
    report: dict[str, Any] | None = None
    ranks: int = 0
    has_run: bool = False
    lost: float | None = None
    errors: list[str] = field(default_factory=list)
    is_ending: bool = False
    reported: threading.Event = field(default_factory=threading.Event)
    _hears_errors: threading.Thread | None = None

    def hear(self) -> None:
        """Start to read the agent's output, in separate threads."""
        self._hears_errors = threading.Thread(target=self._read_errors, daemon=True)
        self._hears_errors.start()
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, word: str) -> None:
        """Send a word to the agent; a lost agent does not receive it."""
        self.is_ending |= word == "end"
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # the agent is lost: the reader thread notes that
            self.process.stdin.write(f"{word}\n".encode())
            self.process.stdin.flush()

    def _read(self) -> None:
        """Read reports and numbers of ranks until the connection ends."""
        assert self.process.stdout is not None and self._hears_errors is not None
        for line in self.process.stdout:
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if not isinstance(values, dict):  # output of a login shell, which may be a number
                continue
            if "versions" in values:
                self.report = values
                self.reported.set()
            self.ranks = values.get("ranks", self.ranks)
            self.has_run |= self.ranks > 0
        self.process.wait()
        self._hears_errors.join(_LAST_WORDS_SECONDS)
        if not self.is_ending:
            self.lost = time.monotonic()
        self.reported.set()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line.decode(errors="replace").strip())

    def fault(self, folder: Path, python: str) -> str | None:
        """Return the reason why no ranks can start on this host, or None.

        Args:
            folder: Working directory that the host needs.
            python: Interpreter that the host needs.
        """
        name = f"{self.host.place}: {self.host.name}"
        if self.report is not None and self.lost is not None:
            return f"{name} was lost while the others were asked: {self._last_words}"
        if self.report is not None:
            missing = self.report["missing"]
            return f"{name} lacks {', '.join(missing)}" if missing else None
        code = self.process.poll()
        if code == _NO_FOLDER:
            return f"{name} has no folder {folder}: the repository must be at the same path on every host"
        if code == _NO_PYTHON:
            return f"{name} has no interpreter {python}: the environment must be at the same path on every host"
        if code is None:
            return f"{name} does not answer within {REPORT_SECONDS:.0f} s"
        if code == _NO_SSH:
            return f"{name} cannot be reached over ssh: {self._last_words}"
        return f"{name} cannot be examined: exit code {code}: {self._last_words}"

    @property
    def _last_words(self) -> str:
        return next((line for line in reversed(self.errors) if line), "ssh says nothing")

    @property
    def is_silent(self) -> bool:
        """Whether the host does not answer, or no longer answers. A host that refuses is not silent."""
        if self.report is not None:
            return self.lost is not None
        unreachable = self.process.poll() == _NO_SSH and any(u in line for u in _UNREACHABLE for line in self.errors)
        return self.process.poll() is None or unreachable


def start_agents(hosts: Sequence[HostLine], task: Mapping[str, Any], folder: Path, port: int) -> list[HostAgent]:
    """Connect to all hosts at once, and wait until each has sent its report or has failed.

    From then on the agents receive signs of life, until they end.

    Args:
        hosts: Hosts of the launch; the first is the master's.
        task: Task for each agent, without the port.
        folder: Working directory on every host.
        port: Master port to try; 0: the agent chooses one.

    Returns:
        One agent per host.
    """
    source = Path(__file__).with_name("remote_agent.py").read_text(encoding="utf-8")
    agents: list[HostAgent] = []
    try:
        for host in hosts:
            own = json.dumps({**task, "port": port})  # for each host: if the first does not answer, another is master
            command = [*SSH, host.target, shell_command(folder, [task["python"], "-c", source, own])]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C must reach the launch alone
            )
            agents.append(HostAgent(host, process))
            agents[-1].hear()
        threading.Thread(target=_keep_alive, args=(agents,), daemon=True).start()
        deadline = time.monotonic() + REPORT_SECONDS
        for agent in agents:
            agent.reported.wait(max(0.0, deadline - time.monotonic()))
    except BaseException:  # for example from a signal
        end_agents(agents)
        raise
    return agents


def _keep_alive(agents: Sequence[HostAgent]) -> None:
    while any(agent.process.poll() is None for agent in agents):
        for agent in agents:
            if not agent.is_ending:
                agent.tell("alive")
        time.sleep(ALIVE_SECONDS)


def end_agents(agents: Sequence[HostAgent]) -> None:
    """End the agents and everything of the launch on every host that can be reached."""
    for agent in agents:
        agent.tell("end")
        if agent.report is None:  # ssh may still be connecting; an agent that has started ends with its connection
            agent.process.kill()
        assert agent.process.stdin is not None
        with contextlib.suppress(OSError):  # the agent is lost
            agent.process.stdin.close()
    deadline = time.monotonic() + END_SECONDS
    for agent in agents:
        if agent.lost is None:
            try:
                agent.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{agent.host.name} does not answer: what runs there may be left", file=sys.stderr)
        agent.process.kill()


def check_agents(
    agents: list[HostAgent], *, folder: Path, python: str, port: int, allow_fewer: bool
) -> tuple[list[HostAgent], int]:
    """Choose the hosts to run on, and the port of the master.

    Args:
        agents: Agents of all hosts.
        folder: Working directory on every host, for messages.
        python: Interpreter on every host, for messages.
        port: Master port that was asked for, for messages; 0: any.
        allow_fewer: Whether to continue without hosts that do not answer.

    Returns:
        Agents of the hosts to run on, and the master port.

    Raises:
        UsageError: One message with everything that is wrong.
    """
    silent = [agent for agent in agents if agent.is_silent] if allow_fewer else []
    for agent in silent:
        print(f"moe-train launch: warning: {agent.fault(folder, python)}; going on without it", file=sys.stderr)
        agent.process.kill()
    kept = [agent for agent in agents if agent not in silent]
    if not kept:
        raise UsageError("no host of the hostfile answers over ssh")
    faults = [fault for agent in kept if (fault := agent.fault(folder, python)) is not None]
    if not faults:
        faults = _differences(kept)
    first = kept[0].report
    if first is not None and first["taken"] is not None:
        faults.append(f"--master-port ({port}): is taken on {kept[0].host.name} ({first['taken']}): choose another")
    if faults:
        raise UsageError("; ".join(faults))
    assert first is not None
    return kept, first["port"]


def _differences(agents: list[HostAgent]) -> list[str]:
    found = []
    first = agents[0]
    assert first.report is not None
    for name, value in first.report["versions"].items():
        for agent in agents[1:]:
            assert agent.report is not None
            other = agent.report["versions"].get(name)
            if other != value:
                where = f"{value} on {first.host.name}, {other} on {agent.host.name}"
                found.append(f"the version of {name} differs between hosts: {where}")
                break
    return found


def master_address(agents: Sequence[HostAgent], name: str | None = None) -> str:
    """Return the first host's address, as the last host of the list resolves it.

    Args:
        agents: Agents of the hosts to run on.
        name: Name or address by which the others reach the first host; None: its name in the hostfile.

    Raises:
        UsageError: If the last host cannot resolve the name.
    """
    if name is not None and ":" in name:
        return name  # IPv6 address: agents look at IPv4 only
    if len(agents) == 1 and name is None:
        return "127.0.0.1"
    report = agents[-1].report
    address = report["addresses"].get(name or agents[0].host.name) if report is not None else None
    if address is None and name is not None:
        raise UsageError(f"--master-addr ({name}): {agents[-1].host.name} does not know it: give an address")
    if address is None:
        raise UsageError(
            f"{agents[-1].host.name} does not know the address of {agents[0].host.name}: give it as --master-addr"
        )
    return str(address)


def networks(agents: Sequence[HostAgent], address: str) -> list[str]:
    """Return the network of the first host's address, such as 10.0.0.7/24; all its networks if no interface has it."""
    report = agents[0].report
    assert report is not None
    found: dict[str, int] = report["networks"]
    chosen = {address: found[address]} if address in found else found
    return [f"{own}/{length}" for own, length in chosen.items()]
