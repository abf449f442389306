"""Runs with both scopes of the CV^2 terms, and what they come to."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner.processes import ROOT, TrainingRun, run_training
from benchmarks.runner.results import say
from moe_train.config.errors import EXIT_DIVERGED

SCOPES = ("step", "micro_step")
_RUN_TIMEOUT_SECONDS = 3600
# With a warm-up of 30 steps the model itself diverges at these rates with some seeds, without any balance term too.
_HIDDEN_64 = (
    "--model.hidden_size=64",
    "--model.intermediate_size=192",
    "--model.num_heads=2",
    "--data.source=python_stdlib",
    "--data.tokenizer=bpe",
    "--data.bpe_vocab_size=1024",
    "--data.validation_fraction=0.01",
    "--train.micro_batch_size=8",
    "--train.sequence_length=128",
)
_QUICKSTART = (
    f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
    "--data.validation_max_bytes=100000",
    "--train.validate_every=0",
    "--checkpoint.every=0",
)
SETTINGS = {
    "hidden 64, rate 6e-3": (*_HIDDEN_64, "--optim.learning_rate=6e-3"),
    "hidden 64, rate 3e-3": (*_HIDDEN_64, "--optim.learning_rate=3e-3"),
    "quickstart": _QUICKSTART,
}


@dataclass(frozen=True)
class RunResult:
    """What one run came to.

    Attributes:
        setting: Name of the setting.
        scope: model.moe.balance_scope.
        seed: Seed.
        steps: Steps taken; fewer than wanted if the run diverged.
        skipped: Skipped steps.
        worst_norm: Largest gradient norm.
        bits_per_byte: Bits per byte of the held-out text at the end; None: the run diverged.
    """

    setting: str
    scope: str
    seed: int
    steps: int
    skipped: int
    worst_norm: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class Pair:
    """Both scopes of a setting, over its seeds.

    Attributes:
        setting: Name of the setting.
        skipped: Skipped steps of all seeds, by scope.
        diverged: Runs that diverged, by scope.
        bits_per_byte: Mean over the seeds, by scope; None: a run diverged.
        difference: Mean of step minus micro_step, bits per byte, over the seeds of which both runs came to their end;
            None: fewer than two did.
        noise: Twice the standard error of that difference.
    """

    setting: str
    skipped: dict[str, int]
    diverged: dict[str, int]
    bits_per_byte: dict[str, float | None]
    difference: float | None
    noise: float | None

    @property
    def holds(self) -> bool:
        """Whether step has no more skipped steps and diverged runs, and a loss that is not worse beyond the noise.

        Where the losses cannot be compared, it must have diverged less often.
        """
        fewer = all(one["step"] <= one["micro_step"] for one in (self.skipped, self.diverged))
        if self.difference is None or self.noise is None:
            return fewer and self.diverged["step"] < self.diverged["micro_step"]
        return fewer and self.difference <= self.noise

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"holds": self.holds}


def train_rows(settings: dict[str, int], seeds: Sequence[int], jobs: int, folder: Path) -> list[RunResult]:
    """Train every setting with both scopes and all seeds, with a line on stderr for each run that is done.

    Args:
        settings: Steps of each setting, by its name.
        seeds: Seeds.
        jobs: Runs at the same time.
        folder: For the run folders.

    Raises:
        RunFailed: A run ended with an error that is not divergence.
    """
    runs: dict[TrainingRun, tuple[str, str, int]] = {}
    for setting, steps in settings.items():
        for scope, seed in ((scope, seed) for seed in seeds for scope in SCOPES):
            name = f"{setting.replace(', ', '_').replace(' ', '_')}_{scope}_{seed}"
            own = (f"--model.moe.balance_scope={scope}", f"--train.steps={steps}", f"--train.seed={seed}")
            same = ("--train.precision=fp32", "--train.sample_tokens=0", "--telemetry.tensorboard=false")
            options = (*SETTINGS[setting], *own, *same, "--telemetry.every=1")
            runs[TrainingRun(name, folder / name, options)] = (setting, scope, seed)
    results: dict[TrainingRun, RunResult] = {}

    def note(run: TrainingRun, seconds: float) -> None:
        results[run] = result = read_result(*runs[run], run.records())
        end = "diverged" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits/byte"
        say(f"[{len(results)}/{len(runs)}] {run.name}: {end}, {result.skipped} skipped, {seconds:.0f} s")

    run_training(list(runs), jobs, _RUN_TIMEOUT_SECONDS, note, allowed=(0, EXIT_DIVERGED))
    return [results[run] for run in runs]


def read_result(setting: str, scope: str, seed: int, records: Sequence[dict[str, Any]]) -> RunResult:
    """Read what a run came to from its records, one per step."""
    steps = [record for record in records if "train/loss" in record]
    norms = [float("inf") if record["train/grad_norm"] is None else record["train/grad_norm"] for record in steps]
    skipped = sum(record["train/skipped"] for record in steps)
    return RunResult(setting, scope, seed, steps[-1]["step"], skipped, max(norms), records[-1].get("val/bits_per_byte"))


def pairs_of(results: Sequence[RunResult]) -> list[Pair]:
    """Hold the scopes of each setting against each other."""
    pairs = []
    for setting in dict.fromkeys(result.setting for result in results):
        of = {s: [r for r in results if (r.setting, r.scope) == (setting, s)] for s in SCOPES}
        ends = {scope: [result.bits_per_byte for result in these] for scope, these in of.items()}
        diverged = {scope: sum(end is None for end in each) for scope, each in ends.items()}
        both = [(a, b) for a, b in zip(*ends.values(), strict=True) if a is not None and b is not None]
        away = [a - b for a, b in both]
        is_known = len(away) > 1
        means = {s: _mean(each) for s, each in ends.items()}
        noise = 2 * statistics.stdev(away) / len(away) ** 0.5 if is_known else None
        skipped = {scope: sum(result.skipped for result in these) for scope, these in of.items()}
        pairs.append(Pair(setting, skipped, diverged, means, _mean(away) if is_known else None, noise))
    return pairs


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
