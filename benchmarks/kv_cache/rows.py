"""Rows of the kv_cache benchmark: what each shares, its training, what was measured of it, and what that shows."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner.processes import ROOT, TrainingRun, run_training
from benchmarks.runner.results import say
from benchmarks.runner.rounds import median_ratio

CONFIG = ROOT / "benchmarks" / "kv_cache" / "model.yaml"
RECOMPUTED_LENGTH = 1024
LEAST_GAIN = 5.0  # of the cache over recomputing the prefix at that length
NOISE = 0.02  # of a ratio of two speeds, measured in turn: a smaller difference is none
_RUN_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Sharing:
    """How layers and heads share keys and values.

    Attributes:
        kv_layers: M, layers that own keys and values.
        num_kv_heads: G, heads of one of them.
        num_layers: L, layers of the model.
        num_heads: H, query heads of a layer.
    """

    kv_layers: int
    num_kv_heads: int
    num_layers: int
    num_heads: int

    @property
    def name(self) -> str:
        """Name of it in the field."""
        if self.kv_layers < self.num_layers:
            return "MLKV"
        return {self.num_heads: "MHA", 1: "MQA"}.get(self.num_kv_heads, "GQA")

    @property
    def pair(self) -> str:
        """Both numbers, in words."""
        return f"({self.kv_layers}, {self.num_kv_heads})"


@dataclass(frozen=True)
class Decoded:
    """Decoding with one model.

    Attributes:
        parameters: Number of the model's parameters.
        weight_bytes: Bytes of the parameters.
        cache_bytes: Bytes that the cache object reports, for all sequences at the longest length.
        formula_bytes: Bytes of 2 B S M G d elements.
        seconds: By length, the seconds of each round.
        tokens: New tokens of a round, over all sequences.
        batch_size: Number of sequences.
    """

    parameters: int
    weight_bytes: int
    cache_bytes: int
    formula_bytes: int
    seconds: dict[int, list[float]]
    tokens: int
    batch_size: int

    def largest_batch(self, memory_bytes: int) -> int:
        """Number of sequences of the longest length whose cache fits into the memory beside the weights."""
        return max(0, memory_bytes - self.weight_bytes) // (self.cache_bytes // self.batch_size)


@dataclass(frozen=True)
class Recomputed:
    """Greedy decoding of one sequence, with a cache and without.

    Attributes:
        length: Tokens of the sequence at the last step.
        cached_tokens_per_second: Speed with the cache.
        recomputed_tokens_per_second: Speed without: every token from a forward pass over all before it.
        ratio: Median of the ratios of each round.
        same_tokens: Whether both chose the same tokens.
    """

    length: int
    cached_tokens_per_second: float
    recomputed_tokens_per_second: float
    ratio: float
    same_tokens: bool


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        name: MHA, GQA, MQA or MLKV.
        kv_layers: M, layers that own keys and values.
        num_kv_heads: G, heads of one of them.
        parameters: Number of parameters of the model that decodes.
        cache_bytes: Measured bytes, all sequences at the longest length.
        formula_bytes: Calculated bytes.
        cache_bytes_per_token: Measured bytes per token of one sequence.
        largest_batch: Sequences of the longest length that fit into the memory beside the weights.
        decode_tokens_per_second: Speed at the longest length, all sequences together.
        decode_tokens_per_second_by_length: Speed at every length.
        speed_over_mha: By length, the median of the ratios of each round.
        loss: Held-out cross-entropy of the trained model, nats per token; None: not trained.
    """

    name: str
    kv_layers: int
    num_kv_heads: int
    parameters: int
    cache_bytes: int
    formula_bytes: int
    cache_bytes_per_token: int
    largest_batch: int
    decode_tokens_per_second: float
    decode_tokens_per_second_by_length: dict[int, float]
    speed_over_mha: dict[int, float]
    loss: float | None

    @property
    def pair(self) -> str:
        """Both numbers, in words."""
        return f"({self.kv_layers}, {self.num_kv_heads})"


def train_rows(sharings: Sequence[Sharing], steps: int, seed: int, jobs: int, folder: Path) -> dict[Sharing, float]:
    """Train all rows, with a line on stderr for each that is done.

    Args:
        sharings: Rows to train.
        steps: Steps of each run.
        seed: Seed of all runs.
        jobs: Runs at the same time.
        folder: For the run folders.

    Returns:
        Held-out loss of each, nats per token.

    Raises:
        RunFailed: A run did not end well.
    """
    shared = (f"--config={CONFIG}", f"--train.steps={steps}", f"--train.seed={seed}")
    shared += (f"--optim.warmup_steps={steps // 5}",)
    runs: dict[TrainingRun, Sharing] = {}
    for sharing in sharings:
        name = f"kv_layers_{sharing.kv_layers}_heads_{sharing.num_kv_heads}"
        own = (f"--model.kv_layers={sharing.kv_layers}", f"--model.num_kv_heads={sharing.num_kv_heads}")
        runs[TrainingRun(name, folder / name, (*shared, *own))] = sharing
    losses: dict[Sharing, float] = {}

    def note(run: TrainingRun, seconds: float) -> None:
        losses[runs[run]] = loss = run.records()[-1]["val/cross_entropy"]
        say(f"[{len(losses)}/{len(runs)}] {runs[run].name} {runs[run].pair}: loss {loss:.3f}, {seconds:.0f} s")

    say(f"{len(runs)} runs of {steps} steps, {jobs} at a time")
    run_training(list(runs), jobs, _RUN_TIMEOUT_SECONDS, note)
    return losses


def result_rows(decoded: dict[Sharing, Decoded], losses: dict[Sharing, float], memory_bytes: int) -> list[RowResult]:
    """Rows of the table, MHA among them, in the order of `decoded`.

    Args:
        decoded: Decoding of every row.
        losses: Loss of every row, or empty.
        memory_bytes: Memory for weights and cache.
    """
    mha = next(measured for sharing, measured in decoded.items() if sharing.name == "MHA")
    longest = max(mha.seconds)
    rows = []
    for sharing, measured in decoded.items():
        speeds = {length: measured.tokens / statistics.median(s) for length, s in measured.seconds.items()}
        rows.append(
            RowResult(
                name=sharing.name,
                kv_layers=sharing.kv_layers,
                num_kv_heads=sharing.num_kv_heads,
                parameters=measured.parameters,
                cache_bytes=measured.cache_bytes,
                formula_bytes=measured.formula_bytes,
                cache_bytes_per_token=measured.cache_bytes // (measured.batch_size * longest),
                largest_batch=measured.largest_batch(memory_bytes),
                decode_tokens_per_second=speeds[longest],
                decode_tokens_per_second_by_length=speeds,
                speed_over_mha={n: median_ratio(mha.seconds[n], s) for n, s in measured.seconds.items()},
                loss=losses.get(sharing),
            )
        )
    return rows


def claims_of(rows: Sequence[RowResult], recomputed: Recomputed) -> list[dict[str, Any]]:
    """What the benchmark is to show, and whether this run of it does.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    differing = [row.pair for row in rows if row.cache_bytes != row.formula_bytes]
    claims = [
        {
            "claim": f"The cache takes the bytes of the formula, 2 B S M G d elements, in all {len(rows)} rows"
            + (f", but not in {', '.join(differing)}." if differing else "."),
            "holds": not differing,
        }
    ]
    for name in ("MQA", "MLKV"):
        members = [row for row in rows if row.name == name]
        if members:
            claims.append(_speed_claim(name, members))
    claims.append(
        {
            "claim": f"At length {recomputed.length:,} decoding with the cache is at least {LEAST_GAIN:g} times as "
            f"fast as recomputing the prefix: {recomputed.ratio:.0f} times.",
            "holds": recomputed.ratio >= LEAST_GAIN,
        }
    )
    return claims


def _speed_claim(name: str, members: Sequence[RowResult]) -> dict[str, Any]:
    lengths = list(members[0].speed_over_mha)
    longest = max(lengths)
    slower = [
        f"{row.pair} at {length:,} ({ratio:.2f})"
        for row in members
        for length, ratio in row.speed_over_mha.items()
        if ratio < 1 - NOISE
    ]
    no_faster = [
        f"{row.pair} ({row.speed_over_mha[longest]:.2f})" for row in members if row.speed_over_mha[longest] <= 1 + NOISE
    ]
    least, most = (pick(row.speed_over_mha[longest] for row in members) for pick in (min, max))
    span = f"{least:.2f}" if len(members) == 1 else f"{least:.2f} to {most:.2f}"
    words = (
        f"{name} decodes no slower than MHA at any length (within {NOISE:.0%}), and faster at {longest:,}: {span} "
        "times as fast"
    )
    words += f"; slower: {', '.join(slower)}" if slower else ""
    words += f"; not faster at {longest:,}: {', '.join(no_faster)}" if no_faster else ""
    return {"claim": f"{words}.", "holds": not slower and not no_faster}
