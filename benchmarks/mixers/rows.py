"""Quality in the mixers benchmark: training runs of one model with each mixer and hybrid, and what they come to.

The hybrids have attention in one of four layers. Their control is the same hybrid with the output of the other three
mixers multiplied by zero (zeroed.py). What is inside then changes nothing, so one control serves all hybrids.
"""

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import moe_train
from benchmarks.runner.processes import ROOT, Process, run_processes
from benchmarks.runner.results import say
from moe_train.config.model import MIXER_FIELDS, ModelConfig
from moe_train.config.parts import MixerLike
from moe_train.config.registry import load_part
from moe_train.train.telemetry.records import read_records

CONFIG = ROOT / "configs" / "quickstart.yaml"
PARTS = Path(__file__).parent / "parts"
MIXERS = ("ttt_linear", "ttt_mlp", "rwkv4", "rwkv7", "infini")
INFINI_SEGMENT = 32  # in sequences of 128: the usual segment would leave the memory unread
HELD_OUT_BYTES = 16_384
STANDARD_ERRORS = 3  # by which a hybrid must beat its control
_CURVE_POINTS = 5
_CURVE_SEQUENCES = 32  # of a validation before the end, which takes all
_RUNS_OF_A_WORKER = 6
_WORKER_TIMEOUT_SECONDS = 7200


@dataclass(frozen=True)
class Variant:
    """A pattern of mixers over the layers of the model.

    Attributes:
        name: Its name in tables.
        mixers: model.mixers.
    """

    name: str
    mixers: tuple[str, ...]

    @property
    def is_hybrid(self) -> bool:
        """Whether a mixer shares the model with attention."""
        return len(self.mixers) > 1


ATTENTION = Variant("attention", ("attention",))
ALONE = tuple(Variant(name, (name,)) for name in MIXERS)
HYBRIDS = tuple(Variant(f"{name} x 3, attention", (*(name,) * 3, "attention")) for name in MIXERS)
CONTROL = Variant("zero x 3, attention", ("zeroed",) * 3 + ("attention",))
TRAINED = (ATTENTION, CONTROL, *ALONE, *HYBRIDS)
TIMED = (ATTENTION, *ALONE, *HYBRIDS)


@dataclass(frozen=True)
class Size:
    """Size of a training run.

    Attributes:
        steps: Steps.
        sequences: Sequences of a step.
        tokenizer: data.tokenizer: bytes learn more of a context in few steps than a BPE of 4,096 entries.
    """

    steps: int
    sequences: int
    tokenizer: str


FULL = Size(700, 16, "bpe")  # the quickstart's
SHORT_INIT_STD = 0.08  # of other sizes, near 1 / sqrt(hidden_size): from 0.02, mixers take long to begin to learn


@dataclass(frozen=True)
class Run:
    """One run to train.

    Attributes:
        variant: Mixers of the model.
        seed: Seed of weights, order of the data and noise.
        size: Steps, and what is in one.
    """

    variant: Variant
    seed: int
    size: Size

    def path(self, folder: Path) -> Path:
        """Run folder, in the folder of all runs."""
        size = f"{self.size.steps}x{self.size.sequences}_{self.size.tokenizer}"
        return folder / f"{'_'.join(self.variant.mixers)}_{self.seed}_{size}"

    def is_done(self, folder: Path) -> bool:
        """Whether the run has ended well in the folder of all runs."""
        return (self.path(folder) / "summary.json").exists()


@dataclass(frozen=True)
class RunResult:
    """What one run came to.

    Attributes:
        variant: Name of the variant.
        seed: train.seed.
        curve: Tokens trained on and held-out bits per byte, at each validation.
    """

    variant: str
    seed: int
    curve: tuple[tuple[int, float], ...]

    @property
    def bits_per_byte(self) -> float:
        """Held-out bits per byte at the end."""
        return self.curve[-1][1]


@dataclass(frozen=True)
class Difference:
    """Mean difference of paired runs.

    Attributes:
        mean: Mean over the seeds, in bits per byte.
        standard_error: Standard error of the mean.
        seeds: Number of seeds.
    """

    mean: float
    standard_error: float
    seeds: int

    @property
    def is_below_zero(self) -> bool:
        """Whether it is below zero by STANDARD_ERRORS standard errors."""
        return self.mean < -STANDARD_ERRORS * self.standard_error


def sections_of(run: Run, folder: Path) -> dict[str, dict[str, Any]]:
    """What a run changes of the quickstart's configuration.

    The learning rate falls with the square root of the batch: with the quickstart's, smaller batches do not learn.

    Args:
        run: The run.
        folder: Folder of all runs.
    """
    segment = {"infini": {"segment_length": INFINI_SEGMENT}} if "infini" in run.variant.mixers else {}
    train = {
        "run_dir": str(run.path(folder)),
        "steps": run.size.steps,
        "seed": run.seed,
        "global_batch_size": run.size.sequences,
        "micro_batch_size": run.size.sequences,
        "validate_every": max(1, run.size.steps // _CURVE_POINTS),
        "validation_sequences": _CURVE_SEQUENCES,
        "precision": "fp32",
        "sample_tokens": 0,
    }
    usual = moe_train.load_config(CONFIG)
    usual_sequences = usual.train.global_batch_size or run.size.sequences
    optim = {
        "learning_rate": usual.optim.learning_rate * (run.size.sequences / usual_sequences) ** 0.5,
        "warmup_steps": min(usual.optim.warmup_steps, run.size.steps // 6),
    }
    short = {"init_std": SHORT_INIT_STD} if run.size != FULL else {}
    return {
        "optim": optim,
        "model": {"mixers": list(run.variant.mixers), **unread_fields(run.variant), **segment, **short},
        "data": {"validation_max_bytes": HELD_OUT_BYTES, "tokenizer": run.size.tokenizer},
        "train": train,
        "checkpoint": {"every": 0},
        "telemetry": {"tensorboard": False},
    }


def unread_fields(variant: Variant) -> dict[str, Any]:
    """Defaults of the model's fields that no mixer of a variant reads: other values would be refused."""
    if ATTENTION.name in variant.mixers:
        return {}
    kinds: list[MixerLike] = [load_part("mixers", name) for name in variant.mixers]
    unread = MIXER_FIELDS.difference(*(kind.reads for kind in kinds))
    return {name: ModelConfig.model_fields[name].default for name in sorted(unread)}


def runs_of(seeds: Sequence[int], size: Size) -> list[Run]:
    """List the runs: every variant with the first seed, then with the next.

    Args:
        seeds: Seeds.
        size: Size of every run.
    """
    return [Run(variant, seed, size) for seed in seeds for variant in TRAINED]


def train(runs: Sequence[Run], jobs: int, folder: Path) -> None:
    """Train; a run that has ended in the folder is not repeated.

    A worker trains several runs after one another, each alone: their starts would take longer than short runs.

    Args:
        runs: The runs.
        jobs: Workers at the same time, one thread each.
        folder: For the run folders.

    Raises:
        RunFailed: A worker ended with an error.
    """
    left = [run for run in runs if not run.is_done(folder)]
    path = os.pathsep.join([str(PARTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    workers = []
    for start in range(0, len(left), _RUNS_OF_A_WORKER):
        own = left[start : start + _RUNS_OF_A_WORKER]
        words = [f"{run.seed}/{run.variant.name}" for run in own]
        sizes = [f"--{name}={value}" for name, value in asdict(own[0].size).items()]
        command = (sys.executable, "-m", "benchmarks.mixers.worker", str(folder), *sizes, *words)
        log = folder / f"worker_{own[0].seed}_{start}.log"
        workers.append(Process(f"worker of {words[0]} to {words[-1]}", command, environment, log))
    done = 0

    def note(name: str, seconds: float) -> None:
        nonlocal done
        done += 1
        say(f"[{done}/{len(workers)}] {name}: {seconds:.0f} s")

    run_processes(workers, jobs, _WORKER_TIMEOUT_SECONDS, note)


def results_in(folder: Path, runs: Sequence[Run]) -> list[RunResult]:
    """Results of the runs that have ended."""
    done = [run for run in runs if run.is_done(folder)]
    return [read_result(run, read_records(run.path(folder) / "metrics.jsonl")) for run in done]


def read_result(run: Run, records: Sequence[dict[str, Any]]) -> RunResult:
    """Read what a run came to from its records; the last of the validations is over all held-out text."""
    # A validation between two records of training has no count of tokens of its own; every step has as many.
    trained = next(record for record in reversed(records) if "train/tokens" in record)
    tokens = trained["train/tokens"] // trained["step"]
    validated = [record for record in records if "val/bits_per_byte" in record]
    curve = {record["step"] * tokens: record["val/bits_per_byte"] for record in validated}
    return RunResult(run.variant.name, run.seed, tuple(sorted(curve.items())))


def difference(results: Sequence[RunResult], variant: Variant, base: Variant) -> Difference | None:
    """Bits per byte of a variant minus those of another, paired by seed; None: fewer than two seeds have both."""
    ends = {(result.variant, result.seed): result.bits_per_byte for result in results}
    seeds = sorted({seed for name, seed in ends if name == variant.name and (base.name, seed) in ends})
    if len(seeds) < 2:
        return None
    away = [ends[variant.name, seed] - ends[base.name, seed] for seed in seeds]
    return Difference(statistics.fmean(away), statistics.stdev(away) / len(away) ** 0.5, len(away))


def mean_curve(results: Sequence[RunResult], variant: Variant) -> tuple[list[int], list[float]]:
    """Tokens trained on, and bits per byte there: means over the seeds of a variant; empty without runs."""
    curves = [result.curve for result in results if result.variant == variant.name]
    points = list(zip(*curves, strict=True))
    return [point[0][0] for point in points], [statistics.fmean(value for _, value in point) for point in points]


def quality_claims(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """What each hybrid is to show: that its mixer does something.

    Returns:
        For each hybrid that has runs: claim, in words with its figures; holds.
    """
    claims = []
    for hybrid in HYBRIDS:
        found = difference(results, hybrid, CONTROL)
        if found is not None:
            claims.append(
                {
                    "claim": f"{hybrid.name} beats itself with the mixer's output at zero by {STANDARD_ERRORS} "
                    f"standard errors: {found.mean:+.4f} ± {found.standard_error:.4f} bits per byte, "
                    f"{found.seeds} seeds.",
                    "holds": found.is_below_zero,
                }
            )
    return claims
