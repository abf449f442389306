"""The rows of benchmarks/kv_cache.py: what each shares, what was measured of it, and what that shows."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

RECOMPUTED_LENGTH = 1024
LEAST_GAIN = 5.0  # of the cache over recomputing the prefix at that length
NOISE = 0.02  # of a ratio of two speeds, measured in turn: less of a difference is none


@dataclass(frozen=True)
class Sharing:
    """How layers and heads share keys and values.

    Attributes:
        kv_layers: M, the layers that own keys and values.
        num_kv_heads: G, the heads of one of them.
        num_layers: L.
        num_heads: H.
    """

    kv_layers: int
    num_kv_heads: int
    num_layers: int
    num_heads: int

    @property
    def name(self) -> str:
        """What the field calls it."""
        if self.kv_layers < self.num_layers:
            return "MLKV"
        return {self.num_heads: "MHA", 1: "MQA"}.get(self.num_kv_heads, "GQA")

    @property
    def pair(self) -> str:
        """Both numbers."""
        return f"({self.kv_layers}, {self.num_kv_heads})"


@dataclass(frozen=True)
class Decoded:
    """One model's decoding.

    Attributes:
        parameters: Of the model.
        weight_bytes: Of its parameters.
        cache_bytes: The cache object's own, of all sequences at the longest length.
        formula_bytes: 2 B S M G d elements.
        seconds: By length, of each round's steps.
        tokens: New tokens of a round, over all sequences.
        batch_size: Sequences.
    """

    parameters: int
    weight_bytes: int
    cache_bytes: int
    formula_bytes: int
    seconds: dict[int, list[float]]
    tokens: int
    batch_size: int

    def largest_batch(self, memory_bytes: int) -> int:
        """Sequences of the longest length whose cache fits into the memory beside the weights."""
        return max(0, memory_bytes - self.weight_bytes) // (self.cache_bytes // self.batch_size)


@dataclass(frozen=True)
class Recomputed:
    """Greedy decoding of one sequence, with a cache and without.

    Attributes:
        length: Tokens of the sequence at the last step.
        cached_tokens_per_second: Of the model whose cache is largest.
        recomputed_tokens_per_second: Every token from a forward pass over all before it.
        ratio: Median of the rounds' ratios.
        same_tokens: Whether both chose the same tokens.
    """

    length: int
    cached_tokens_per_second: float
    recomputed_tokens_per_second: float
    ratio: float
    same_tokens: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        name: MHA, GQA, MQA or MLKV.
        kv_layers: M.
        num_kv_heads: G.
        parameters: Of the model that is decoded.
        cache_bytes: Measured, of all sequences at the longest length.
        formula_bytes: Calculated.
        cache_bytes_per_token: Measured, of one token of one sequence.
        largest_batch: Sequences of the longest length that fit into the memory, beside the weights.
        decode_tokens_per_second: At the longest length, of all sequences together.
        decode_tokens_per_second_by_length: At every length.
        speed_over_mha: By length: median of the rounds' ratios.
        loss: Held-out cross-entropy of the trained model, nats a token; None: not trained.
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
        """Both numbers."""
        return f"({self.kv_layers}, {self.num_kv_heads})"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def result_rows(decoded: dict[Sharing, Decoded], losses: dict[Sharing, float], memory_bytes: int) -> list[RowResult]:
    """The rows, MHA among them, in the order of `decoded`.

    Args:
        decoded: Of every row.
        losses: Of every row, or empty.
        memory_bytes: For weights and cache.
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


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the rounds' own ratios: what slows a whole round down then counts for nothing."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def claims_of(rows: Sequence[RowResult], recomputed: Recomputed) -> list[dict[str, Any]]:
    """What the experiment is to show, and whether this run of it does.

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
