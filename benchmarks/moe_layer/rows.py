"""Rows of the moe_layer benchmark: shapes, what was measured of each layer, and what that shows."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.runner.rounds import median_ratio

BOUND, OURS = "dense_bound", "moe_train"
LAYERS = (
    BOUND,
    OURS,
    "deepspeed_autoep",
    "deepspeed_dropless",
    "deepspeed_capacity",
    "hf_eager",
    "hf_grouped_mm",
)
ROUTINGS = ("balanced", "zipf")
CAPACITY_FACTOR = 2.0  # of deepspeed_capacity
MOST_OF_BOUND = (1.12, 1.30)  # of the first two CPU shapes
LEAST_GAIN = {"deepspeed_autoep": 1.15, "deepspeed_dropless": 1.3, "hf_grouped_mm": 1.3, "hf_eager": 3.0}


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer.

    Attributes:
        T: Tokens.
        D: hidden_size.
        F: intermediate_size of an expert.
        E: num_experts.
        K: top_k.
        model: Model that has these sizes, or empty.
    """

    T: int
    D: int
    F: int
    E: int
    K: int
    model: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by letter."""
        return {name: value for name, value in asdict(self).items() if name != "model"}

    @property
    def name(self) -> str:
        """All sizes, in words."""
        sizes = ", ".join(f"{name} {value:,}" for name, value in self.sizes.items())
        return f"{self.model}: {sizes}" if self.model else sizes

    @property
    def capacity(self) -> int:
        """Most assignments of an expert in deepspeed_capacity."""
        return -int(-CAPACITY_FACTOR * self.K * self.T // self.E)


CPU_SHAPES = (Shape(2048, 512, 1024, 16, 2), Shape(2048, 512, 256, 64, 8), Shape(4096, 256, 512, 8, 2))
CUDA_SHAPES = (
    Shape(8192, 4096, 14336, 8, 2, "Mixtral-8x7B"),
    Shape(8192, 2048, 768, 128, 8, "Qwen3-30B-A3B"),
    Shape(8192, 7168, 2048, 64, 8, "DeepSeek-V3, 64 of 256 experts"),
)


@dataclass(frozen=True)
class Case:
    """One shape with one routing.

    Attributes:
        shape: Sizes of the layer.
        routing: balanced or zipf.
    """

    shape: Shape
    routing: str


@dataclass(frozen=True)
class Measured:
    """What was measured of one layer in one case.

    Attributes:
        seconds: Time of the forward and backward pass in every round.
        peak_bytes: Most bytes that were held at once during both, over what was held before.
        dropped: Share of the assignments that the layer leaves out.
    """

    seconds: tuple[float, ...]
    peak_bytes: int
    dropped: float = 0.0


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        shape: T, D, F, E and K.
        routing: balanced or zipf.
        layer: Name of the layer.
        ms: Median over rounds of the forward and backward pass.
        ratio_to_bound: Median over rounds of its time divided by dense_bound's; None: that was not measured.
        ratio_to_moe_train: Median over rounds of its time divided by moe_train's; None: that was not measured.
        peak_bytes: Most bytes that were held at once.
        dropped: Share of the assignments that the layer leaves out.
    """

    shape: dict[str, int]
    routing: str
    layer: str
    ms: float
    ratio_to_bound: float | None
    ratio_to_moe_train: float | None
    peak_bytes: int
    dropped: float


def rows_of(case: Case, measured: dict[str, Measured]) -> list[RowResult]:
    """Rows of one case, in the order of `measured`."""

    def ratio(layer: Measured, to: str) -> float | None:
        return median_ratio(layer.seconds, measured[to].seconds) if to in measured else None

    return [
        RowResult(
            shape=case.shape.sizes,
            routing=case.routing,
            layer=name,
            ms=statistics.median(layer.seconds) * 1e3,
            ratio_to_bound=ratio(layer, BOUND),
            ratio_to_moe_train=ratio(layer, OURS),
            peak_bytes=layer.peak_bytes,
            dropped=layer.dropped,
        )
        for name, layer in measured.items()
    ]


def dropped_share(counts: Sequence[int], capacity: int) -> float:
    """Share of the assignments that are over the capacity.

    Args:
        counts: Assignments of each expert.
        capacity: Most assignments that an expert takes.
    """
    return sum(max(0, count - capacity) for count in counts) / max(1, sum(counts))


def claims_of(rows: Sequence[RowResult]) -> list[dict[str, Any]]:
    """What the measurement is to show, and whether this run of it does; nothing of what was not measured.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    ours = [row for row in rows if row.layer == OURS]
    claims = [
        claim
        for shape, most in zip(CPU_SHAPES, MOST_OF_BOUND, strict=False)
        if (claim := _bound_claim([row for row in ours if row.shape == shape.sizes], shape, most))
    ]
    for layer, least in LEAST_GAIN.items():
        theirs = [row for row in rows if row.layer == layer and row.ratio_to_moe_train is not None]
        if theirs:
            claims.append(_speed_claim(layer, theirs, least))
    if ours and any(row.layer not in (OURS, BOUND) for row in rows):
        claims.append(_memory_claim(ours, rows))
    return claims


def _bound_claim(ours: Sequence[RowResult], shape: Shape, most: float) -> dict[str, Any] | None:
    ratios = [(row.ratio_to_bound, row.routing) for row in ours if row.ratio_to_bound is not None]
    if not ratios:
        return None
    found = ", ".join(f"{ratio:.2f} {routing}" for ratio, routing in ratios)
    words = f"{OURS} takes at most {most:.2f} times as long as the dense bound at {shape.name}: {found}."
    return {"claim": words, "holds": all(ratio <= most for ratio, _ in ratios)}


def _speed_claim(layer: str, theirs: Sequence[RowResult], least: float) -> dict[str, Any]:
    gains = [(row.ratio_to_moe_train or 0.0, _where(row)) for row in theirs]
    below = [f"{gain:.2f} at {where}" for gain, where in gains if gain < least]
    span = " to ".join(f"{pick(gains)[0]:.2f}" for pick in (min, max)[: len(gains)])
    words = f"{OURS} is at least {least:g} times as fast as {layer} at every shape and routing: {span} times"
    words += f"; less: {', '.join(below)}" if below else ""
    return {"claim": f"{words}.", "holds": not below}


def _memory_claim(ours: Sequence[RowResult], rows: Sequence[RowResult]) -> dict[str, Any]:
    more = []
    for own in ours:
        same_case = [row for row in rows if (row.shape, row.routing) == (own.shape, own.routing)]
        more += [
            f"{own.peak_bytes / row.peak_bytes:.2f} times {row.layer}'s at {_where(row)}"
            for row in same_case
            if row.layer not in (OURS, BOUND) and own.peak_bytes > row.peak_bytes
        ]
    words = f"{OURS}'s peak memory is no higher than any peer's at any shape and routing"
    words += f", but it is {', '.join(more)}" if more else ""
    return {"claim": f"{words}.", "holds": not more}


def _where(row: RowResult) -> str:
    return f"{'/'.join(map(str, row.shape.values()))} {row.routing}"
