"""What the long_context benchmark measures: bytes and time of attention, and bytes of a step, over the length of a row.

Legend: H query heads, G key/value heads, S tokens of a row, d head size, V vocabulary.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner.peak import STEP, peak_bytes
from benchmarks.runner.results import say
from benchmarks.runner.rounds import median_ratio, run_rounds
from moe_train.config.model import ModelConfig
from moe_train.model.block import NO_RECOMPUTE, Recompute
from moe_train.model.build import build_model
from moe_train.model.parameters import materialize
from moe_train.model.transformer import LossOutput, Tokens, Transformer
from moe_train.ops.attention import visible_keys
from moe_train.ops.attention_blocks import attend_blocks, rows_of_documents

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WINDOW = 1024
MOST_MASKED = 16_384  # tokens of a row for which a mask of all pairs is formed: 1 GiB in fp32
ROW, NUM_DOCUMENTS = 8192, 8  # of the row that is compared with its documents alone
LONG = 4096  # tokens from which on memory must be linear
_VOCAB_SIZE = 257
_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
    "window_pattern": [WINDOW, None],
    "moe": {"num_experts": 4, "top_k": 2},
}
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


def zipf_starts(length: int, seed: int) -> tuple[int, ...]:
    """Cut a row into documents, whose lengths follow a Zipf law from 16 tokens to the whole row.

    Args:
        length: S, tokens of the row.
        seed: Seed of the lengths.

    Returns:
        First columns of the documents, and S.
    """
    draws, starts = np.random.default_rng(seed), [0]
    while starts[-1] < length:
        size = 16 * math.exp(draws.random() * math.log(length / 16))  # density 1 / size
        starts.append(min(length, starts[-1] + int(size)))
    return tuple(starts)


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
    for kind in (*KINDS, STEPPED):
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
    claim = (
        f"{NUM_DOCUMENTS} documents in a row of {ROW:,} tokens take {packing:.2f} times the CPU time of the same "
        "documents alone (at most 1.3)"
    )
    return [*claims, {"claim": claim, "holds": packing <= 1.3}]


def _measure(kind: Kind, length: int, seed: int) -> Point:
    starts = zipf_starts(length, seed) if kind.is_packed else None
    if kind.is_step:
        assert starts is not None, "the row has documents"
        run = training_step(_MODEL, length, starts, seed)
    else:
        run = _attention(kind, length, starts, seed)
    peak = peak_of(run)
    began = time.process_time()
    run()
    return Point(kind.name, length, peak, time.process_time() - began)


def peak_of(run: Callable[[], None]) -> int:
    """Count the most bytes that exist at one time while something runs, beside those that existed before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        with torch.profiler.record_function(STEP):
            pass  # the first one does not count
        with torch.profiler.record_function(STEP):
            run()
    return peak_bytes(profile)


def _attention(kind: Kind, length: int, starts: tuple[int, ...] | None, seed: int) -> Callable[[], None]:
    """Make a function that runs one attention forward and backward."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(1, heads, length, HEAD_DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]

    def run() -> None:
        if kind.is_masked:
            out = _masked(*inputs, starts, kind.window)
        else:
            window = kind.window if kind.window is not None and kind.window < length else None
            blocks = rows_of_documents(length, starts, window, _CPU, torch.float32, HEAD_DIM)
            out = attend_blocks(*inputs, blocks)
        torch.autograd.grad(out.sum(), inputs)

    return run


def _masked(q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...] | None, window: int | None) -> Tensor:
    length = q.shape[2]
    positions_1S, documents_1S = torch.arange(length)[None], None
    if starts is not None:
        sizes = torch.tensor(starts).diff()
        documents_1S = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[None]
    mask = visible_keys(positions_1S, positions_1S, documents_1S, documents_1S, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def training_step(
    values: dict[str, Any], length: int, starts: tuple[int, ...], seed: int, recompute: Recompute = NO_RECOMPUTE
) -> Callable[[], None]:
    """Make a function that runs a small model forward and backward, over one row.

    Args:
        values: Model section of a configuration.
        length: S, tokens of the row.
        starts: First columns of its documents, and S.
        seed: Seed of weights and tokens.
        recompute: What the backward pass computes again.
    """
    config = ModelConfig.model_validate(values)
    model: Transformer = build_model(config, _VOCAB_SIZE, recompute=recompute, measures=False)
    materialize(model, seed=seed, dtype=torch.float32, device=_CPU)
    sizes = torch.tensor(starts).diff()
    ids_1S = torch.randint(_VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))
    documents_1S = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[None]
    tokens = Tokens(ids_1S, torch.zeros(1, dtype=torch.int64), documents_BS=documents_1S, document_starts=starts)

    def run() -> None:
        model.zero_grad(set_to_none=False)
        output: LossOutput = model(tokens, targets_BS=ids_1S.roll(-1, 1))
        output.total.backward()

    return run
