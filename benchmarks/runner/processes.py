"""Processes that benchmarks start: ranks of one program, and training runs, each with its output in a file."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner.slow_link import slow_link
from moe_train.distributed.bootstrap import local_rank_environments

ROOT = Path(__file__).resolve().parents[2]

_INTERPRETER = (sys.executable, "-W", "ignore::FutureWarning")
_POLL_SECONDS = 0.2
_SHOWN_LINES = 15  # at the end of the output of a process that failed


class RunFailed(RuntimeError):
    """A process that ended with an error or took too long; the message has the end of its output.

    Attributes:
        reason: Last line that it wrote, or what went wrong where it wrote nothing.
    """

    def __init__(self, process: "Process", what: str) -> None:
        written = process.output.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in written if line.strip()][-_SHOWN_LINES:]
        self.reason = lines[-1].strip() if lines else what
        shown = "".join(f"\n  | {line}" for line in lines)
        super().__init__(f"{process.name}: {what}; the end of its output:{shown}")


@dataclass(frozen=True)
class Process:
    """A process to start.

    Attributes:
        name: Its name in messages.
        command: Program and arguments.
        environment: All environment variables.
        output: File of what it writes to stdout and stderr.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    output: Path


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs.

    Attributes:
        prefix: What comes before its command: the network namespace of its node.
        environment: All environment variables.
    """

    prefix: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class TrainingRun:
    """One run of `moe-train train` on the CPU, in one process of one thread.

    Attributes:
        name: Its name in messages.
        folder: Its run folder, which must not hold an earlier run.
        options: Options of `moe-train train`, without the run folder.
    """

    name: str
    folder: Path
    options: tuple[str, ...]

    def records(self) -> list[dict[str, Any]]:
        """What it wrote to metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def run_training(
    runs: Sequence[TrainingRun],
    jobs: int,
    timeout_seconds: float,
    when_done: Callable[[TrainingRun, float], None],
    *,
    allowed: Sequence[int] = (0,),
) -> None:
    """Train, several runs at a time.

    Args:
        runs: In the order in which they start.
        jobs: Most runs at the same time.
        timeout_seconds: Most time of one run.
        when_done: Called with each run that ended well, and its seconds.
        allowed: Exit codes with which a run ends well.

    Raises:
        RunFailed: The first run that did not end well; the others are ended.
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = [
        Process(
            run.name,
            (sys.executable, "-m", "moe_train", "train", *run.options, f"--train.run_dir={run.folder}"),
            environment,
            run.folder.with_name(f"{run.folder.name}.log"),  # beside the run folder, which the run creates itself
        )
        for run in runs
    ]
    by_name = {run.name: run for run in runs}
    run_processes(processes, jobs, timeout_seconds, lambda name, seconds: when_done(by_name[name], seconds), allowed)


@contextlib.contextmanager
def rank_places(
    num_ranks: int, num_nodes: int = 1, link_mbit: float = 0.0, *, threads: int = 1, on_cpu: bool = True
) -> Iterator[list[RankPlace]]:
    """Places of ranks on this machine; their nodes exist as long as the block runs.

    Args:
        num_ranks: Number of ranks.
        num_nodes: Network namespaces among which the ranks are divided; 1: there is no network between ranks.
        link_mbit: Megabits per second of each node's line.
        threads: OMP_NUM_THREADS of each rank.
        on_cpu: Whether a GPU is left alone, even if there is one.

    Raises:
        SlowLinkUnavailable: There are to be several nodes, and this machine cannot make them.
    """
    environments = [each | {"OMP_NUM_THREADS": str(threads)} for each in local_rank_environments(num_ranks)]
    if not on_cpu:
        kept = {name: value for name, value in os.environ.items() if name == "DS_ACCELERATOR"}
        environments = [{name: each[name] for name in each if name != "DS_ACCELERATOR"} | kept for each in environments]
    if num_nodes == 1:
        yield [RankPlace((), each) for each in environments]
        return
    size = num_ranks // num_nodes
    with slow_link(num_nodes, link_mbit) as nodes:
        places = []
        for rank, each in enumerate(environments):
            node = nodes[rank // size]
            own = {"LOCAL_RANK": str(rank % size), "LOCAL_WORLD_SIZE": str(size)}
            own |= {"GROUP_RANK": str(node.rank), "GROUP_WORLD_SIZE": str(num_nodes)}
            own |= {"MASTER_ADDR": nodes[0].address, "GLOO_SOCKET_IFNAME": node.interface}
            places.append(RankPlace(node.prefix, each | own))
        yield places


def run_ranks(
    name: str,
    program: Sequence[str],
    places: Sequence[RankPlace],
    folder: Path,
    timeout_seconds: float,
    allowed: Sequence[int] = (0,),
) -> None:
    """Run a program as every rank, each a fresh interpreter, and wait for all of them.

    Args:
        name: Name of the run in messages.
        program: Arguments of the interpreter: a script or `-m MODULE`, and what follows.
        places: Where the ranks run.
        folder: For their output; it is made.
        timeout_seconds: Most time.
        allowed: Exit codes with which a rank ends well.

    Raises:
        RunFailed: The first rank that did not end well; the others are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        Process(
            f"{name}, rank {rank}",
            (*place.prefix, *_INTERPRETER, *program),
            place.environment,
            folder / f"rank_{rank}.log",
        )
        for rank, place in enumerate(places)
    ]
    run_processes(processes, len(processes), timeout_seconds, lambda *_: None, allowed)


def run_processes(
    processes: Sequence[Process],
    jobs: int,
    timeout_seconds: float,
    when_done: Callable[[str, float], None],
    allowed: Sequence[int] = (0,),
) -> None:
    """Run processes, so many at a time; whatever happens, none of them is left.

    Args:
        processes: In the order in which they start.
        jobs: Most processes at the same time.
        timeout_seconds: Most time of one process.
        when_done: Called with the name of each process that ended well, and its seconds.
        allowed: Exit codes with which a process ends well.

    Raises:
        RunFailed: The first process that did not end well; the others are ended.
    """
    waiting = list(reversed(processes))
    active: list[tuple[Process, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                process = waiting.pop()
                active.append((process, _start(process), time.monotonic()))
            time.sleep(_POLL_SECONDS)
            for entry in list(active):
                process, started, began = entry
                seconds, code = time.monotonic() - began, started.poll()
                if code is None and seconds > timeout_seconds:
                    raise RunFailed(process, f"not done after {timeout_seconds:.0f} s")
                if code is not None and code not in allowed:
                    raise RunFailed(process, f"ended with code {code}")
                if code is not None:
                    active.remove(entry)
                    when_done(process.name, seconds)
    finally:
        for _, started, _ in active:
            started.kill()
        for _, started, _ in active:
            started.wait()


def _start(process: Process) -> subprocess.Popen[bytes]:
    process.output.parent.mkdir(parents=True, exist_ok=True)
    with process.output.open("wb") as output:
        return subprocess.Popen(
            process.command,
            cwd=ROOT,
            env=process.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
