"""Rows of the hidden_decoding benchmark: numbers of copies and windows, their training, and what the figures show."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.runner.processes import ROOT, TrainingRun, run_training
from benchmarks.runner.results import say
from moe_train.config.model import ModelConfig
from moe_train.model.flops import training_flops_per_token

CONFIG = ROOT / "benchmarks" / "hidden_decoding" / "model.yaml"
MOST_ATTENTION, MOST_DECODE, MOST_PREFILL = 2.3, 1.25, 1.15  # times the plain model, n = 2
LEAST_PREFILL_LENGTH = 1024  # tokens; the hidden positions of a shorter prompt are more of it
STANDARD_ERRORS = 3
_RUN_TIMEOUT_SECONDS = 7200
# Of a dense model of 1.2B parameters after 500B tokens (CSWA), Wu et al. 2025, arXiv 2504.14992.
PAPER_LOSSES = {1: 2.601, 2: 2.576, 3: 2.567}


@dataclass(frozen=True)
class Copies:
    """Settings of hidden copies.

    Attributes:
        copies: n, copies of a token.
        window: W, positions.
        chunk: C, positions; None: there are no chunks.
    """

    copies: int
    window: int = 0
    chunk: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Value of model.hidden_copies."""
        return {"copies": self.copies, "window_positions": self.window, "chunk": self.chunk}

    @property
    def name(self) -> str:
        """Name in the field, with the numbers."""
        if self.copies == 1:
            return "plain"
        kind = "PHD" if not self.window else "PHD-SWA" if self.chunk is None else "PHD-CSWA"
        numbers = [self.copies, *([self.window] if self.window else []), *([self.chunk] if self.chunk else [])]
        return f"{kind} {'-'.join(map(str, numbers))}"


PLAIN, PHD, SWA, CSWA = Copies(1), Copies(2), Copies(2, 16), Copies(2, 16, 32)
ROWS = (PLAIN, PHD, SWA, CSWA, Copies(3), Copies(3, 16, 32))


@dataclass(frozen=True)
class Timing:
    """Time of a row.

    Attributes:
        seconds: Least seconds of all rounds.
        ratio: Median over the rounds of its seconds over those of the plain row.
    """

    seconds: float
    ratio: float


@dataclass(frozen=True)
class Trained:
    """Training runs of a row, one per seed.

    Attributes:
        losses: Held-out loss after the last step, by seed, nats per token.
        curve: Tokens and mean held-out loss over the seeds, along the runs.
        flops_per_token: Operations per original token.
    """

    losses: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    flops_per_token: float


def train_rows(rows: Sequence[Copies], steps: int, seeds: int, jobs: int, folder: Path) -> dict[Copies, Trained]:
    """Train every row with every seed on the same tokens.

    Args:
        rows: Rows to train.
        steps: Steps of each run.
        seeds: Number of seeds.
        jobs: Runs at the same time.
        folder: For the run folders.

    Raises:
        RunFailed: A run did not end well.
    """
    runs: dict[TrainingRun, tuple[Copies, int]] = {}
    every = max(1, steps // 10)
    shared: tuple[str, ...] = (
        f"--config={CONFIG}",
        f"--train.steps={steps}",
        f"--train.validate_every={every}",
        "--train.validation_sequences=null",
    )
    shared += (f"--optim.warmup_steps={steps // 10}",)
    for row in rows:
        own = tuple(f"--model.hidden_copies.{name}={value}" for name, value in row.settings.items() if value)
        for seed in range(seeds):
            name = f"{row.name.replace(' ', '_')}_seed_{seed}"
            runs[TrainingRun(name, folder / name, (*shared, *own, f"--train.seed={seed}"))] = (row, seed)
    found: dict[tuple[Copies, int], list[tuple[int, float]]] = {}

    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    tokens_per_step = values["train"]["global_batch_size"] * values["train"]["sequence_length"]

    def note(run: TrainingRun, seconds: float) -> None:
        losses = {r["step"]: r["val/cross_entropy"] for r in run.records() if "val/cross_entropy" in r}
        found[runs[run]] = curve = [(step * tokens_per_step, loss) for step, loss in losses.items()]
        say(f"[{len(found)}/{len(runs)}] {run.name}: loss {curve[-1][1]:.4f}, {seconds:.0f} s")

    say(f"{len(runs)} runs of {steps} steps, {jobs} at a time")
    run_training(list(runs), jobs, _RUN_TIMEOUT_SECONDS, note)
    trained = {}
    for row in rows:
        curves = [found[row, seed] for seed in range(seeds)]
        mean = tuple(
            (points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*curves, strict=True)
        )
        config = ModelConfig.model_validate(values["model"] | {"hidden_copies": row.settings})
        flops = training_flops_per_token(config, values["data"]["bpe_vocab_size"], values["train"]["sequence_length"])
        trained[row] = Trained(tuple(curve[-1][1] for curve in curves), mean, flops)
    return trained


def paired_difference(row: Trained, plain: Trained) -> tuple[float, float]:
    """Compute the mean over the seeds of a row's loss less that of the plain row, and its standard error."""
    differences = [ours - theirs for ours, theirs in zip(row.losses, plain.losses, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return statistics.fmean(differences), error


def claims_of(
    attention: dict[Copies, Timing],
    prefill: dict[Copies, Timing],
    decode: dict[Copies, Timing],
    extra_bytes: dict[Copies, tuple[int, int]],
    trained: dict[Copies, Trained],
    length: int,
) -> list[dict[str, Any]]:
    """State what the figures show, in words, and whether they do.

    Args:
        attention: Time of attention in training.
        prefill: Time of the prefill.
        decode: Time per decoded token.
        extra_bytes: Bytes of each row's cache beyond the plain one, and by the formula.
        trained: Training of each row, or empty.
        length: Tokens of the prompt.
    """
    worst = max(attention[row].ratio for row in (PHD, SWA, CSWA))
    bars = [
        (f"attention of two copies, forward and backward, is {worst:.2f} x plain", worst, MOST_ATTENTION),
        (f"a token is decoded in {decode[CSWA].ratio:.2f} x the time of plain", decode[CSWA].ratio, MOST_DECODE),
    ]
    if length >= LEAST_PREFILL_LENGTH:
        words = f"the prefill of {CSWA.name} takes {prefill[CSWA].ratio:.2f} x the time of plain"
        bars.append((words, prefill[CSWA].ratio, MOST_PREFILL))
    claims = [{"claim": f"{words} (at most {bar:g})", "holds": value <= bar} for words, value, bar in bars]
    is_exact = all(found == formula for found, formula in extra_bytes.values())
    claims.append({"claim": "caches are those of the plain model and 2 W (n-1) G d numbers a layer", "holds": is_exact})
    if trained:
        mean, error = paired_difference(trained[CSWA], trained[PLAIN])
        claims.append(
            {
                "claim": f"the loss of {CSWA.name} at equal tokens is {mean:+.4f} (standard error {error:.4f}, paired) "
                f"from plain: not worse by more than {STANDARD_ERRORS} standard errors",
                "holds": mean <= STANDARD_ERRORS * error,
            }
        )
    return claims
