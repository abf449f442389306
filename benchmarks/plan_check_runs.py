"""What benchmarks/plan_check.py starts: moe-train doctor, ranks whose memory is counted, and real training runs."""

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plan_check_rows import STEPS_A_RECORD, Measured, Place, Setting
from benchmarks.slow_link import slow_link
from moe_train.config.machine import Machine, read_machine
from moe_train.distributed.bootstrap import local_rank_environments

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 900  # of one group of ranks
MEMORY_STEPS = 3
WARM_UP_STEPS = STEPS_A_RECORD  # of a training run, which are not timed
EXPECTED_GIGABYTES = 0.5  # a second between nodes: more than any line of the settings, less than none
_POLL_SECONDS = 0.1
_SHOWN_LINES = 15


@dataclass(frozen=True)
class Start:
    """How a rank is started.

    Attributes:
        prefix: Before its command.
        environment: Of the process.
    """

    prefix: tuple[str, ...]
    environment: dict[str, str]


@contextlib.contextmanager
def starts_of(place: Place) -> Iterator[list[Start]]:
    """The ranks of a place, whose nodes are there as long as the context is.

    Raises:
        SlowLinkUnavailable: If there are to be nodes and this machine cannot make them.
    """
    environments = local_rank_environments(place.ranks)
    if place.nodes == 1:
        yield [Start((), each) for each in environments]
        return
    size = place.ranks // place.nodes
    with slow_link(place.nodes, place.link_mbit) as nodes:
        starts = []
        for rank, each in enumerate(environments):
            node = nodes[rank // size]
            own = {"LOCAL_RANK": str(rank % size), "LOCAL_WORLD_SIZE": str(size)}
            own |= {"GROUP_RANK": str(node.rank), "GROUP_WORLD_SIZE": str(place.nodes)}
            own |= {"MASTER_ADDR": nodes[0].address, "GLOO_SOCKET_IFNAME": node.interface}
            starts.append(Start(node.prefix, each | own))
        yield starts


def measure_machine(place: Place, folder: Path) -> tuple[Machine, bool]:
    """This machine as the ranks of a place see it, by moe-train doctor; whether that names a line between nodes."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "machine.json"
    command = ["-m", "moe_train", "doctor", "--output", str(output), "--shared-dir", str(folder), "--timeout", "60"]
    command += [f"--expect-bandwidth={EXPECTED_GIGABYTES}"] if place.nodes > 1 else []
    run_ranks(command, place, folder / "doctor", allowed=(0, 1))  # 1: it names a slow rank or line, and has measured
    problems = json.loads(output.read_text(encoding="utf-8"))["problems"]
    return read_machine(output), any(problem["kind"] == "link" for problem in problems)


def measure(setting: Setting, steps: int, folder: Path) -> Measured:
    """A setting's memory, bytes and step time.

    Args:
        setting: What to run.
        steps: Timed ones of a training run, a multiple of STEPS_A_RECORD.
        folder: For its files.
    """
    memory = folder / f"{setting.name}_memory"
    memory.mkdir(parents=True)
    script = [str(ROOT / "benchmarks" / "plan_check_rank.py"), str(memory), str(MEMORY_STEPS)]
    run_ranks([*script, *setting.options(folder / "unused", MEMORY_STEPS)], setting.place, memory)
    files = [memory / f"{rank}.json" for rank in range(setting.ranks)]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    run = folder / f"{setting.name}_run"
    options = setting.options(run, WARM_UP_STEPS + steps)
    run_ranks([str(ROOT / "launch" / "train.py"), *options], setting.place, folder / f"{setting.name}_log")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [record["perf/step_ms"] / 1e3 for record in records if record["step"] > WARM_UP_STEPS]
    shutil.rmtree(run)
    return Measured(
        states=max(each["states"] for each in found),
        peak=max(each["peak"] for each in found),
        all_to_all=statistics.mean(each["all_to_all"] for each in found),
        seconds=statistics.median(seconds),
    )


def run_ranks(arguments: Sequence[str], place: Place, folder: Path, allowed: Sequence[int] = (0,)) -> None:
    """Run a program as every rank, and wait.

    Args:
        arguments: Of the interpreter.
        place: Of the ranks.
        folder: For their output.
        allowed: Exit codes that are well.

    Raises:
        RuntimeError: If one does not end well; with the end of its output.
        SlowLinkUnavailable: If this machine cannot make the place's nodes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with starts_of(place) as starts:
        _run(arguments, starts, folder, allowed)


def _run(arguments: Sequence[str], starts: Sequence[Start], folder: Path, allowed: Sequence[int]) -> None:
    outputs, started = [folder / f"rank_{rank}.log" for rank in range(len(starts))], []
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        for output, start in zip(outputs, starts, strict=True):
            with output.open("wb") as stream:
                command = [*start.prefix, sys.executable, "-W", "ignore", *arguments]
                started.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=start.environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
                    )
                )
        while None in (codes := [rank.poll() for rank in started]) and not set(codes) - {None, *allowed}:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{arguments[0]}: not done after {TIMEOUT_SECONDS} s")
            time.sleep(_POLL_SECONDS)
        failed = next((rank for rank, code in enumerate(codes) if code not in allowed), None)
        if failed is not None:
            lines = outputs[failed].read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
            raise RuntimeError(f"rank {failed} ended with code {codes[failed]}:" + "".join(f"\n  | {x}" for x in lines))
    finally:
        for rank in started:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
