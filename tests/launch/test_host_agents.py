"""Guards of a launch, by what they report, and by real ones on this machine with a script in the place of ssh."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_train.config.errors import UsageError
from moe_train.launch import host_agents as agents_module
from moe_train.launch.host_agents import (
    HostAgent,
    check_agents,
    end_agents,
    master_address,
    networks,
    start_agents,
)
from moe_train.launch.hostfile import HostLine
from moe_train.launch.supervise import Signals, Stopped

ROOT = Path(__file__).resolve().parents[2]
TASK = {"mark": "MOE_TRAIN_LAUNCH=none", "program": "launch/train.py", "python": sys.executable}


def host(name: str) -> HostLine:
    return HostLine(name, 2, f"--hostfile f, {name}")


def ended(code: int) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(["sh", "-c", f"exit {code}"], stdin=subprocess.PIPE)
    process.wait(10)
    return process


def report(**more: Any) -> dict[str, Any]:
    return {"missing": [], "versions": {"torch": "2"}, "addresses": {}, "port": 5, "taken": None, **more}


@pytest.fixture
def lives() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_without_the_first_host_the_master_is_the_next(lives: "subprocess.Popen[bytes]") -> None:
    dead = HostAgent(host("a"), ended(255), errors=["ssh: connect to host a port 22: No route to host"])
    known = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
    others = [HostAgent(host(name), lives, report(addresses=known, port=port)) for name, port in (("b", 7), ("c", 8))]
    kept, port = check_agents([dead, *others], folder=ROOT, python="p", port=0, allow_fewer=True)
    assert (kept, port) == (others, 7)
    assert master_address(kept) == "10.0.0.2"
    with pytest.raises(UsageError, match="No route to host"):
        check_agents([dead, *others], folder=ROOT, python="p", port=0, allow_fewer=False)
    others[1].report = report(addresses={"a": "10.0.0.1"})
    with pytest.raises(UsageError, match="c does not know the address of b"):
        master_address(kept)
    with pytest.raises(UsageError, match=r"--master-addr \(front\): c does not know it"):
        master_address(kept, "front")


def test_a_host_that_is_lost_after_its_report(lives: "subprocess.Popen[bytes]") -> None:
    lost = HostAgent(host("b"), ended(255), report(), lost=1.0, errors=["Timeout, server b not responding."])
    both = [HostAgent(host("a"), lives, report()), lost]
    with pytest.raises(UsageError, match="b was lost while the others were asked: Timeout, server b"):
        check_agents(both, folder=ROOT, python="p", port=0, allow_fewer=False)
    assert check_agents(both, folder=ROOT, python="p", port=0, allow_fewer=True)[0] == both[:1]


def test_network_of_an_address(lives: "subprocess.Popen[bytes]") -> None:
    agent = HostAgent(host("a"), lives, report(networks={"10.1.2.3": 20, "192.168.0.9": 24}))
    assert networks([agent], "10.1.2.3") == ["10.1.2.3/20"]
    assert networks([agent], "172.16.0.1") == ["10.1.2.3/20", "192.168.0.9/24"]  # of a router


@pytest.fixture
def instead_of_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that gets host and command; it is to be written."""
    monkeypatch.setattr(agents_module, "SSH", ["bash", str(tmp_path / "ssh")])
    return tmp_path / "ssh"


def names(*hosts: str) -> dict[str, Any]:
    return {**TASK, "names": ["localhost", *hosts]}


def test_what_a_login_shell_prints_is_no_report(instead_of_ssh: Path) -> None:
    instead_of_ssh.write_text('printf "42\\n[1]\\nnull\\nwelcome\\n"; eval "$2"\n')
    agents = start_agents([host("a")], names(), ROOT, 0)
    try:
        assert agents[0].report is not None, agents[0].errors
        assert agents[0].report["missing"] == []
        assert agents[0].report["addresses"] == {"localhost": "127.0.0.1"}
        assert all(0 < length <= 32 for length in agents[0].report["networks"].values())
    finally:
        end_agents(agents)
    assert agents[0].process.returncode is not None


@pytest.mark.slow
def test_a_guard_outlives_a_slow_one(instead_of_ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Guards that wait for a word for 2 s only, and one host that takes 5 s to answer.
    monkeypatch.setattr(agents_module, "ALIVE_SECONDS", 0.3, raising=False)
    short = 'command=${2//1.0, 25.0, 8.0/0.1, 2.0, 8.0}; [[ $command != "$2" ]] || exit 1\n'
    instead_of_ssh.write_text(f'{short}if [[ $1 == slow ]]; then sleep 5; fi; eval "$command"\n')
    agents = start_agents([host("fast"), host("slow")], names(), ROOT, 0)
    try:
        assert [agent.lost for agent in agents] == [None, None]
        kept, _ = check_agents(agents, folder=ROOT, python=sys.executable, port=0, allow_fewer=False)
        assert kept == agents
    finally:
        end_agents(agents)


def test_a_signal_while_hosts_are_asked_ends_at_once(instead_of_ssh: Path, tmp_path: Path) -> None:
    instead_of_ssh.write_text("exec sleep 30\n")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=1\n")
    code = (
        "import sys; from moe_train.launch import host_agents as agents; "
        f"agents.SSH = ['bash', {str(instead_of_ssh)!r}]; "
        "from moe_train.cli.launch import run; print('ready', flush=True); "
        f"sys.exit(run(['--hostfile', {str(hostfile)!r}, '--', 'launch/train.py']))"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(1)
            started = time.monotonic()
            process.send_signal(number)
            try:
                assert process.wait(15) == 128 + number
            finally:
                process.kill()
            assert time.monotonic() - started < 5
            assert f"{number.name}: nothing was started" in process.stderr.read()


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals()
        with signals.taken():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGUSR1)
            signals.are_watched = True
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == [signal.SIGUSR1] * 2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
