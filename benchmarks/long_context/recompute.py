"""What recomputation saves and costs: bytes and CPU time of a step, by the part of a block that is recomputed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.long_context.documents import zipf_starts
from benchmarks.long_context.step import make_step, peak_of
from benchmarks.runner.results import say
from benchmarks.runner.rounds import median_ratio, run_rounds
from moe_train.model.block import NO_RECOMPUTE, Recompute

LENGTH = 2048
WAYS = (
    NO_RECOMPUTE,
    Recompute("attention"),
    Recompute("experts"),
    Recompute("block", every=2),
    Recompute("block"),
)
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_layers": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "moe_every": 1,
    "moe": {"num_experts": 8, "top_k": 2, "intermediate_size": 256},
}


@dataclass(frozen=True)
class RecomputeRow:
    """Measurements of a step with one way to recompute.

    Attributes:
        way: What is recomputed, in words.
        peak_bytes: Most bytes at one time in the forward and backward pass, without weights and their gradients.
        time_ratio: CPU time divided by that of a step without recomputation, median over the rounds.
    """

    way: str
    peak_bytes: int
    time_ratio: float


def measure_recompute(rounds: int, seed: int) -> list[RecomputeRow]:
    """Measure a step of a small model in every way, in turn.

    Args:
        rounds: Number of rounds.
        seed: Seed of documents, weights and tokens.
    """
    torch.set_num_threads(1)
    starts = zipf_starts(LENGTH, seed)
    steps = {str(way): make_step(MODEL, LENGTH, starts, seed, recompute=way) for way in WAYS}

    def pass_over(step: Callable[[], None]) -> float:
        began = time.process_time()
        step()
        return time.process_time() - began

    found = run_rounds(list(steps), rounds, lambda way, number: pass_over(steps[way]), warm_ups=1)
    plain = found[str(NO_RECOMPUTE)]
    rows = [RecomputeRow(way, peak_of(step), median_ratio(found[way], plain)) for way, step in steps.items()]
    for row in rows:
        say(f"recompute {row.way}: {row.peak_bytes / 2**20:,.1f} MiB, {row.time_ratio:.2f} times the CPU time")
    return rows


def recompute_claims(rows: Sequence[RecomputeRow]) -> list[dict[str, Any]]:
    """List what the measurements show: claims in words, and whether they hold."""
    by_way = {row.way: row for row in rows}
    plain, block = by_way[str(NO_RECOMPUTE)], by_way["block"]
    saved = plain.peak_bytes / block.peak_bytes
    between = all(block.peak_bytes < row.peak_bytes < plain.peak_bytes for row in rows if row not in (plain, block))
    return [
        {
            "claim": f"recomputed blocks: {saved:.1f} times less memory (at least 3) for {block.time_ratio:.2f} times "
            "the CPU time (at most 1.5)",
            "holds": saved >= 3 and block.time_ratio <= 1.5,
        },
        {"claim": "recomputed parts of blocks take less memory than none and more than all", "holds": between},
    ]
