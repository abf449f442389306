"""What benchmarks/plan_check.py starts: moe-train doctor, ranks whose memory is counted, and real training runs."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plan_check_rows import STEPS_A_RECORD, Measured, Setting
from moe_train.config.machine import Machine, read_machine
from moe_train.parallel.bootstrap import local_rank_environments

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 900  # of one group of ranks
MEMORY_STEPS = 3
WARM_UP_STEPS = STEPS_A_RECORD  # of a training run, which are not timed
_POLL_SECONDS = 0.1
_SHOWN_LINES = 15


def measure_machine(ranks: int, folder: Path) -> Machine:
    """This machine as so many ranks see it, by moe-train doctor."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"machine_{ranks}.json"
    command = ["-m", "moe_train", "doctor", "--output", str(output), "--shared-dir", str(folder), "--timeout", "60"]
    run_ranks(command, ranks, folder / f"doctor_{ranks}", allowed=(0, 1))  # 1: it names a slow rank, and has measured
    return read_machine(output)


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
    run_ranks([*script, *setting.options(folder / "unused", MEMORY_STEPS)], setting.ranks, memory)
    files = [memory / f"{rank}.json" for rank in range(setting.ranks)]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    run = folder / f"{setting.name}_run"
    options = setting.options(run, WARM_UP_STEPS + steps)
    run_ranks([str(ROOT / "launch" / "train.py"), *options], setting.ranks, folder / f"{setting.name}_log")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [record["perf/step_ms"] / 1e3 for record in records if record["step"] > WARM_UP_STEPS]
    shutil.rmtree(run)
    return Measured(
        states=max(each["states"] for each in found),
        peak=max(each["peak"] for each in found),
        all_to_all=statistics.mean(each["all_to_all"] for each in found),
        seconds=statistics.median(seconds),
    )


def run_ranks(arguments: Sequence[str], ranks: int, folder: Path, allowed: Sequence[int] = (0,)) -> None:
    """Run a program as every rank, and wait.

    Args:
        arguments: Of the interpreter.
        ranks: How many.
        folder: For their output.
        allowed: Exit codes that are well.

    Raises:
        RuntimeError: If one does not end well; with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outputs, started = [folder / f"rank_{rank}.log" for rank in range(ranks)], []
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        for output, environment in zip(outputs, local_rank_environments(ranks), strict=True):
            with output.open("wb") as stream:
                command = [sys.executable, "-W", "ignore", *arguments]
                started.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
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
