"""Kill a training run again and again, start it again each time, and hold its losses against an uninterrupted run.

Each life of the run ends with SIGKILL to one rank or to all of them, in turn; every third time inside a save, when the
folder of an unfinished checkpoint is there, else at a random moment. With one rank killed, the others have to notice
and end by themselves. In fp32 and on the same layout the losses must be the same numbers, to the last bit.

    python -m benchmarks.kills [--json] [--kills 10] [--ranks 2] [--steps 120] [--seed 0]
"""

import random
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.processes import ROOT
from benchmarks.runner.results import print_json
from moe_train.cli.parity import TRAINING_MODULES
from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.launch.fork_server import ForkedRank, ForkServer, wait_for_all
from moe_train.train.telemetry.records import read_records

OPTIONS = (
    "--model.hidden_size=128",
    "--model.num_layers=2",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.intermediate_size=256",
    "--model.moe.num_experts=8",
    "--optim.schedule=constant",
    "--optim.warmup_steps=5",
    "--optim.learning_rate=3e-3",
    "--train.sequence_length=64",
    "--train.micro_batch_size=2",
    "--train.precision=fp32",
    "--train.sample_tokens=0",
    "--data.source=python_stdlib",
    "--data.validation_fraction=0",
    "--checkpoint.every=4",
    "--telemetry.every=1",
    "--telemetry.tensorboard=false",
)
LIFE_TIMEOUT_SECONDS = 60  # from a kill to the end of all ranks
RUN_TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Life:
    """One start of the run, and its end.

    Attributes:
        killed: Ranks that were killed.
        step: Last step on record by then.
        is_in_save: Whether an unfinished checkpoint was left.
        seconds_to_end: From the kill until no rank lived.
        codes: Exit codes of all ranks.
    """

    killed: tuple[int, ...]
    step: int
    is_in_save: bool
    seconds_to_end: float
    codes: tuple[int, ...]


def losses(folder: Path) -> dict[int, float]:
    """Losses of training by step; a last line that the kill cut off is left out."""
    return {record["step"]: record["train/loss"] for record in read_records(folder / "metrics.jsonl")}


def start(server: ForkServer, num_ranks: int, options: Sequence[str]) -> list[ForkedRank]:
    """Start the ranks of the run."""
    environments = local_rank_environments(num_ranks)
    return [server.start("moe_train.cli.main:main", ["train", *options], each, ROOT) for each in environments]


def run_life(ranks: Sequence[ForkedRank], folder: Path, draw: random.Random, number: int) -> Life | None:
    """Let the run live until it is killed; None where it ended before.

    Args:
        ranks: Ranks of the run.
        folder: Run folder.
        draw: Source of the moment and of the rank that is killed.
        number: Kills so far.
    """
    inside_save, kills_all = number % 3 == 0, number % 2 == 0
    first, deadline = _last_step(folder), time.monotonic() + RUN_TIMEOUT_SECONDS
    more_steps, delay = draw.randint(1, 6), draw.uniform(0.0, 0.15)
    is_due = False
    while not is_due:
        if any(rank.poll() is not None for rank in ranks):
            return None
        if time.monotonic() > deadline:
            raise TimeoutError(f"no step within {RUN_TIMEOUT_SECONDS} s")
        if inside_save:
            is_due = _unfinished(folder) and _last_step(folder) > first
        else:
            is_due = _last_step(folder) >= first + more_steps
            time.sleep(delay if is_due else 0.002)
    killed = tuple(range(len(ranks))) if kills_all else (draw.randrange(len(ranks)),)
    for index in killed:
        ranks[index].kill(signal.SIGKILL)
    began = time.monotonic()
    results = wait_for_all(ranks, LIFE_TIMEOUT_SECONDS)
    codes = tuple(result.returncode for result in results)
    return Life(killed, _last_step(folder), _unfinished(folder), time.monotonic() - began, codes)


def _unfinished(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.part/*"))


def _last_step(folder: Path) -> int:
    try:
        return max(losses(folder), default=0)
    except OSError:
        return 0


def compare(server: ForkServer, scratch: Path, num_ranks: int, num_kills: int, seed: int, steps: int) -> dict[str, Any]:
    """Train without a kill, and with kills.

    Args:
        server: Starts the ranks.
        scratch: Folder for both run folders.
        num_ranks: Number of ranks.
        num_kills: Number of kills.
        seed: Seed of the moments and of the ranks that are killed.
        steps: Steps of the whole run.

    Returns:
        Plain values; "passed" if the loss of every step is the same number, and all kills took place.

    Raises:
        RuntimeError: A run ended otherwise than by a kill.
    """
    draw, lives = random.Random(seed), list[Life]()
    whole, killed = scratch / "uninterrupted", scratch / "killed"
    arguments = [*OPTIONS, f"--train.steps={steps}"]
    results = wait_for_all(start(server, num_ranks, [*arguments, f"--train.run_dir={whole}"]), RUN_TIMEOUT_SECONDS)
    if any(result.returncode for result in results):
        raise RuntimeError(f"the uninterrupted run failed: {results[0]}")
    while len(lives) < num_kills:
        ranks = start(server, num_ranks, [*arguments, f"--train.run_dir={killed}"])
        life = run_life(ranks, killed, draw, len(lives))
        if life is None:
            codes = [result.returncode for result in wait_for_all(ranks, RUN_TIMEOUT_SECONDS)]
            raise RuntimeError(f"the run ended with codes {codes} after {len(lives)} kills: give it more --steps")
        lives.append(life)
    last = wait_for_all(start(server, num_ranks, [*arguments, f"--train.run_dir={killed}"]), RUN_TIMEOUT_SECONDS)
    expected, found = losses(whole), losses(killed)
    different = [step for step in expected if found.get(step) != expected[step]]
    return {
        "ranks": num_ranks,
        "steps": len(expected),
        "kills": len(lives),
        "kills_inside_a_save": sum(life.is_in_save for life in lives),
        "slowest_end_seconds": max(life.seconds_to_end for life in lives),
        "different_steps": different,
        "passed": not different and len(expected) == steps and not any(result.returncode for result in last),
        "lives": lives,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what came of it; 0 if every loss is the same, else 1."""
    parser = BenchmarkParser("kills", __doc__)
    parser.add_number("--kills", 10, "kills of the run")
    parser.add_number("--ranks", 2, "processes on this machine")
    parser.add_number("--steps", 120, "steps of the whole run, enough to be killed so often")
    parser.add_number("--seed", 0, "seed of the moments and of the ranks that are killed", least=0)
    options = parser.read(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="moe_train_kills_") as scratch,
        ForkServer(TRAINING_MODULES, local_rank_environments(1)[0]) as server,
    ):
        found = compare(server, Path(scratch), options.ranks, options.kills, options.seed, options.steps)
    show(found)
    print_json(options, found)
    return 0 if found["passed"] else 1


def show(found: dict[str, Any]) -> None:
    """Print the lives of the run, and whether its losses are the same."""
    for life in found["lives"]:
        where = "inside a save" if life.is_in_save else "between saves"
        print(f"ranks {life.killed} killed {where} after step {life.step}: codes {life.codes}")
    verdict = "the same" if found["passed"] else f"different at steps {found['different_steps'][:10]}"
    print(f"{found['kills']} kills, {found['steps']} steps on {found['ranks']} ranks: losses are {verdict}")
