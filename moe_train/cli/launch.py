"""Command `moe-train launch`: check all hosts of a hostfile, then start ranks on them with the chosen launcher.

    moe-train launch --hostfile launch/hostfile -- launch/train.py --config configs/NAME.yaml --section.field=value

A problem with a host gives one message before anything starts, and exit code 2. At the end no process is left on any
host.
"""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe_train.cli.paths import path_argument
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.distributed.rendezvous import LAUNCH_MARK
from moe_train.launch.commands import LAUNCHERS, PASSED_ON, LaunchPlan, launch_commands, passed_environment
from moe_train.launch.host_agents import HostAgent, check_agents, end_agents, master_address, networks, start_agents
from moe_train.launch.hostfile import HostLine, read_hostfile
from moe_train.launch.supervise import Signals, Stopped, end, start, watch


def run(arguments: Sequence[str]) -> int:
    """Start the ranks and wait for them.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code of the ranks; 128 plus the number of a signal that came before anything was started.

    Raises:
        UsageError: If an argument, the hostfile or a host is wrong.
    """
    options = _parser().parse_args(arguments)
    hosts = read_hostfile(options.hostfile)
    program = _program(options.program)
    signals = Signals()
    with signals.taken():
        try:
            return _launch(options, hosts, program, signals)
        except Stopped as stopped:
            print(f"moe-train launch: {stopped}: nothing was started", file=sys.stderr)
            return 128 + stopped.number


def _launch(options: argparse.Namespace, hosts: Sequence[HostLine], words: Sequence[str], signals: Signals) -> int:
    mark, python, folder = secrets.token_hex(8), sys.executable, Path.cwd()
    environment = passed_environment(options.env, mark, python)
    names = [host.name for host in hosts] if options.allow_fewer_hosts else [hosts[0].name]  # any may be the first
    names += [options.master_addr] if options.master_addr else []
    task = {"mark": f"{LAUNCH_MARK}={mark}", "program": words[0], "python": python, "names": names}
    agents: list[HostAgent] = []
    with tempfile.TemporaryDirectory(prefix="moe-train-launch-") as scratch:
        try:
            agents = start_agents(hosts, task, folder, options.master_port)
            kept, port = check_agents(
                agents, folder=folder, python=python, port=options.master_port, allow_fewer=options.allow_fewer_hosts
            )
            address = master_address(kept, options.master_addr)
            plan = LaunchPlan(
                hosts=[agent.host for agent in kept],
                program=words[0],
                arguments=words[1:],
                python=python,
                folder=folder,
                address=address,
                networks=networks(kept, address),
                port=port,
                environment=environment,
                scratch=Path(scratch),
            )
            commands, extra = launch_commands(options.launcher, plan)
            signals.are_watched = True
            launchers = start(commands, {**extra, LAUNCH_MARK: mark})
            try:
                return watch(launchers, kept, signals)
            finally:
                end(launchers)  # first: if an agent ended deepspeed, deepspeed would contact all hosts again
                end_agents(kept)
        finally:
            end_agents([agent for agent in agents if agent.process.poll() is None])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moe-train launch",
        description="Start ranks on the hosts of a hostfile over ssh, with the launcher of your choice.",
        epilog=f"Handed on to the ranks: {', '.join(PASSED_ON)}, and the lines of .deepspeed_env or DS_ENV_FILE.",
    )
    parser.add_argument(
        "--hostfile",
        type=lambda text: Path(path_argument(text)),
        required=True,
        help="lines NAME slots=N; the first is the master",
    )
    parser.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="pdsh",
        help="deepspeed by pdsh (default) or openmpi; mpirun, the first on PATH; torchrun: one agent per host, by ssh",
    )
    parser.add_argument(
        "--master-addr", metavar="ADDRESS", help="of the first host; default: as the last host knows its name"
    )
    parser.add_argument(
        "--master-port", type=_port, default=0, metavar="N", help="on the first host; default: one that is free there"
    )
    parser.add_argument(
        "--allow-fewer-hosts", action="store_true", help="go on, with a warning, without hosts that do not answer"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable to hand on; may be repeated"
    )
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="after --: launch/train.py or a command, and its options"
    )
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} must be from 1 to 65535")
    return int(text)


def _program(words: Sequence[str]) -> list[str]:
    words = list(words[1:] if words[:1] == ["--"] else words)
    if not words:
        raise UsageError("no program: it follows --, such as: -- launch/train.py --config configs/NAME.yaml")
    return words
