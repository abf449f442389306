"""What the long_context benchmark measures: bytes and time of attention, and bytes of a step, over the length of a row.

Legend: H query heads, G key/value heads, S tokens of a row, d head size, V vocabulary.
"""

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.long_context.documents import WINDOW, zipf_starts
from benchmarks.long_context.step import NARROW, make_step, measure
from benchmarks.runner.processes import rank_places, run_ranks
from benchmarks.runner.results import say
from benchmarks.runner.rounds import median_ratio, run_rounds
from moe_train.ops.attention import visible_keys
from moe_train.ops.attention_blocks import attend_blocks, rows_of_documents

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
MOST_MASKED = 16_384  # tokens of a row for which a mask of all pairs is formed: 1 GiB in fp32
ROW, NUM_DOCUMENTS = 8192, 8  # of the row that is compared with its documents alone
LONG = 4096  # tokens from which on memory must be linear
RANKS = (1, 2, 4)  # that share a row
LEAST_SHARED = 1.6  # times less memory on two ranks than on one
_STEP_ROUNDS = 3  # times that a step on ranks is timed
_RANKS_SECONDS = 1800  # most time of the ranks at all lengths
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kind:
    """A kind of row, and how its attention is computed.

    Attributes:
        name: Name in tables.
        is_packed: Whether the row has documents of Zipf lengths.
        window: Most positions that a token sees; None: all.
        is_masked: Whether torch's attention gets a mask of all pairs of tokens.
        is_step: Whether a whole step of a small model is measured, in place of one attention.
    """

    name: str
    is_packed: bool
    window: int | None = None
    is_masked: bool = False
    is_step: bool = False


DOCUMENTS, WINDOWED = Kind("documents", True), Kind("window", False, WINDOW)
KINDS = (DOCUMENTS, WINDOWED, Kind("documents and window", True, WINDOW))
MASKED = Kind("SDPA with a mask, documents", True, is_masked=True)
STEPPED = Kind("a step, documents, every other layer with the window", True, is_step=True)

SHARED = {
    ranks: Kind(f"a wider, recomputed step on {ranks} rank{'s' * (ranks > 1)}", True, is_step=True) for ranks in RANKS
}


@dataclass(frozen=True)
class Point:
    """Measurements of one kind of row at one length.

    Attributes:
        kind: Name of the kind.
        length: S, tokens of the row.
        peak_bytes: Most bytes at one time in the forward and backward pass, without inputs and weights.
        cpu_seconds: CPU time of one thread of the forward and backward pass.
    """

    kind: str
    length: int
    peak_bytes: int
    cpu_seconds: float


def measure_points(lengths: Sequence[int], seed: int) -> list[Point]:
    """Measure every kind at every length.

    Args:
        lengths: S, tokens of a row.
        seed: Seed of documents and tokens.
    """
    torch.set_num_threads(1)
    points = []
    for kind in (*KINDS, MASKED, STEPPED):
        for length in lengths:
            if not kind.is_masked or length <= MOST_MASKED:
                points.append(_measure(kind, length, seed))
                say(f"{kind.name}, {length:,} tokens: {points[-1].peak_bytes / 2**20:,.1f} MiB")
    return points


def measure_shared(lengths: Sequence[int], seed: int) -> list[Point]:
    """Measure a recomputed step on 1, 2 and 4 ranks that share the row; of the ranks, most bytes and most time count.

    Args:
        lengths: S, tokens of a row; multiples of twice the ranks.
        seed: Seed of documents and tokens.
    """
    points = []
    for num_ranks, kind in SHARED.items():
        with tempfile.TemporaryDirectory() as name, rank_places(num_ranks) as places:
            program = ["-m", "benchmarks.long_context.step", name, str(seed), str(_STEP_ROUNDS), *map(str, lengths)]
            run_ranks(kind.name, program, places, Path(name), _RANKS_SECONDS)
            found = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(num_ranks)]
        for length, of_ranks in zip(lengths, zip(*found, strict=True), strict=True):
            peaks, seconds = zip(*of_ranks, strict=True)
            points.append(Point(kind.name, length, max(peaks), max(seconds)))
            say(f"{kind.name}, {length:,} tokens: {max(peaks) / 2**20:,.1f} MiB")
    return points


def measure_packing(rounds: int, seed: int) -> float:
    """Time documents in one row beside the same documents alone, in turn.

    Args:
        rounds: Number of rounds.
        seed: Seed of queries, keys and values.

    Returns:
        Median over the rounds of the ratio of CPU times.
    """
    torch.set_num_threads(1)
    starts = range(0, ROW + 1, ROW // NUM_DOCUMENTS)
    packed = _attention(DOCUMENTS, ROW, tuple(starts), seed)
    alone = [_attention(WINDOWED, end - first, None, seed) for first, end in itertools.pairwise(starts)]

    def pass_over(what: list[Callable[[], None]], _: int) -> float:
        began = time.process_time()
        for each in what:
            each()
        return time.process_time() - began

    items = {"packed": [packed], "alone": alone}
    found = run_rounds(list(items), rounds, lambda name, number: pass_over(items[name], number), warm_ups=1)
    return median_ratio(found["packed"], found["alone"])


def exponent(points: Sequence[Point], kind: Kind) -> float:
    """Fit the power of the length with which the memory grows from LONG tokens on."""
    own = [point for point in points if point.kind == kind.name and point.length >= LONG]
    slope, _ = statistics.linear_regression(
        [math.log(point.length) for point in own], [math.log(point.peak_bytes) for point in own]
    )
    return slope


def claims_of(points: Sequence[Point], packing: float) -> list[dict[str, Any]]:
    """List what the measurements show: claims in words, and whether they hold."""
    claims = []
    for kind in (*KINDS, STEPPED, *SHARED.values()):
        lengths = [point.length for point in points if point.kind == kind.name and point.length >= LONG]
        if len(lengths) > 1:
            power = exponent(points, kind)
            claim = (
                f"{kind.name}: memory grows with the power {power:.2f} of the length from {lengths[0]:,} to "
                f"{lengths[-1]:,} tokens (at most 1.1)"
            )
            claims.append({"claim": claim, "holds": power <= 1.1})
    bytes_of = {(point.kind, point.length): point.peak_bytes for point in points}
    if (MASKED.name, MOST_MASKED) in bytes_of:
        saved = bytes_of[MASKED.name, MOST_MASKED] / bytes_of[DOCUMENTS.name, MOST_MASKED]
        claim = f"documents at {MOST_MASKED:,} tokens: {saved:.1f} times less memory than with a mask (at least 5)"
        claims.append({"claim": claim, "holds": saved >= 5})
    claims += _claims_of_sharing(points)
    claim = (
        f"{NUM_DOCUMENTS} documents in a row of {ROW:,} tokens take {packing:.2f} times the CPU time of the same "
        "documents alone (at most 1.3)"
    )
    return [*claims, {"claim": claim, "holds": packing <= 1.3}]


def _claims_of_sharing(points: Sequence[Point]) -> list[dict[str, Any]]:
    bytes_of = {(point.kind, point.length): point.peak_bytes for point in points}
    lengths = [point.length for point in points if point.kind == SHARED[1].name]
    if not lengths:
        return []
    one, two, four = (bytes_of[SHARED[ranks].name, max(lengths)] for ranks in RANKS)
    claim = (
        f"a wider, recomputed step at {max(lengths):,} tokens: {one / two:.2f} times less memory on each of 2 ranks "
        f"than on one, {one / four:.2f} times less on each of 4 (at least {LEAST_SHARED} and {LEAST_SHARED**2:.2f})"
    )
    return [{"claim": claim, "holds": one >= LEAST_SHARED * two and one >= LEAST_SHARED**2 * four}]


def _measure(kind: Kind, length: int, seed: int) -> Point:
    starts = zipf_starts(length, seed) if kind.is_packed else None
    run = (
        make_step(NARROW, length, starts or (0, length), seed)
        if kind.is_step
        else _attention(kind, length, starts, seed)
    )
    return Point(kind.name, length, *measure(run))


def _attention(kind: Kind, length: int, starts: tuple[int, ...] | None, seed: int) -> Callable[[], None]:
    """Make a function that runs one attention forward and backward."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, heads, length, HEAD_DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def run() -> None:
        if kind.is_masked:
            out = _masked(q, k, v, starts, kind.window)
        else:
            window = kind.window if kind.window is not None and kind.window < length else None
            blocks = rows_of_documents(length, starts, window, _CPU, torch.float32, HEAD_DIM)
            out = attend_blocks(q, k, v, blocks)
        torch.autograd.grad(out.sum(), (q, k, v))

    return run


def _masked(q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...] | None, window: int | None) -> Tensor:
    length = q.shape[2]
    positions_1S, documents_1S = torch.arange(length)[None], None
    if starts is not None:
        sizes = torch.tensor(starts).diff()
        documents_1S = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[None]
    mask = visible_keys(positions_1S, positions_1S, documents_1S, documents_1S, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
