"""The rows of benchmarks/scaling.py: what was timed along each axis, how time grows, and what that shows.

Legend: T tokens of a micro-batch, D hidden_size, F intermediate_size, E experts, K top_k, L layers.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

AXES = {"experts": "E", "tokens": "T", "layers": "L"}
FEW_EXPERTS, MANY_EXPERTS = 8, 64
MOST_GROWTH = 0.15  # of the layer's time from few to many experts
MOST_SLOPE = 1.05  # in T and in L: proportion, and what noise does to it


@dataclass(frozen=True)
class Point:
    """One thing that is timed.

    Attributes:
        axis: One of AXES.
        T: Tokens.
        E: Experts of a layer.
        L: Layers; 0: the MoE layer alone, without a model around it.
    """

    axis: str
    T: int
    E: int
    L: int

    @property
    def size(self) -> int:
        """What changes along the axis."""
        return getattr(self, AXES[self.axis])

    @property
    def series(self) -> tuple[str, int]:
        """What it is compared with: axis, and T where several are measured along it."""
        return self.axis, self.T if self.axis == "experts" else 0


@dataclass(frozen=True)
class Timing:
    """One forward and backward pass.

    Attributes:
        forward: Seconds of the forward pass.
        both: Seconds of both.
    """

    forward: float
    both: float


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        axis: experts, tokens or layers.
        size: Of it.
        tokens: T.
        experts: E.
        layers: L; 0: the MoE layer alone.
        parameters: Of what was timed.
        forward_ms: Median of the rounds.
        ms: Forward and backward, likewise.
        ratio: Median of the rounds' ratios to the smallest size.
    """

    axis: str
    size: int
    tokens: int
    experts: int
    layers: int
    parameters: int
    forward_ms: float
    ms: float
    ratio: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Series:
    """Rows along one axis, the smallest size first.

    Attributes:
        axis: experts, tokens or layers.
        tokens: T; None: it changes along the axis.
        slope: Exponent of the power law that fits the times best: 0 is no growth, 1 proportion.
        rows: Its rows.
    """

    axis: str
    tokens: int | None
    slope: float
    rows: tuple[RowResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the rows."""
        return {"axis": self.axis, "tokens": self.tokens, "slope": self.slope}


def series_of(timings: dict[Point, list[Timing]], parameters: dict[Point, int]) -> list[Series]:
    """What was timed, by axis, in the order of `timings`.

    Args:
        timings: Of every round; the rounds of all points of an axis are the same.
        parameters: Of every point.
    """
    found = []
    for key in dict.fromkeys(point.series for point in timings):
        points = sorted((point for point in timings if point.series == key), key=lambda point: point.size)
        first = [timing.both for timing in timings[points[0]]]
        rows = tuple(_row(point, timings[point], parameters[point], first) for point in points)
        tokens = None if key[0] == "tokens" else rows[0].tokens
        found.append(Series(key[0], tokens, slope([r.size for r in rows], [r.ms for r in rows]), rows))
    return found


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Of the straight line that fits the logarithms best, by least squares; two or more sizes."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in times]).slope


def claims_of(found: Sequence[Series]) -> list[dict[str, Any]]:
    """What the measurement is to show, and whether this run of it does; nothing of what was not measured.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    claims = _growth_claims([each for each in found if each.axis == "experts" and growth(each) is not None])
    words = {"tokens": "The layer's time grows no faster than T", "layers": "The model's time grows no faster than L"}
    claims += [
        {
            "claim": f"{words[series.axis]}: as {AXES[series.axis]}^{series.slope:.2f} from {series.rows[0].size:,} to "
            f"{series.rows[-1].size:,}.",
            "holds": series.slope <= MOST_SLOPE,
        }
        for series in found
        if series.axis in words
    ]
    return claims


def growth(series: Series) -> float | None:
    """Of the time from few to many experts, as a share; None: one of the two was not measured."""
    ratios = {row.size: row.ratio for row in series.rows}
    if FEW_EXPERTS not in ratios or MANY_EXPERTS not in ratios:
        return None
    return ratios[MANY_EXPERTS] / ratios[FEW_EXPERTS] - 1


def _growth_claims(by_experts: Sequence[Series]) -> list[dict[str, Any]]:
    """One for each size of a micro-batch."""
    claims = []
    for tokens, grown in sorted((series.tokens or 0, growth(series) or 0.0) for series in by_experts):
        words = f"From {FEW_EXPERTS} to {MANY_EXPERTS} experts at fixed K the layer's time grows by at most"
        figures = f"{MOST_GROWTH:.0%} with {tokens:,} tokens a micro-batch: {grown:.1%}"
        claims.append({"claim": f"{words} {figures}.", "holds": grown <= MOST_GROWTH})
    return claims


def _row(point: Point, timings: Sequence[Timing], parameters: int, first: Sequence[float]) -> RowResult:
    return RowResult(
        axis=point.axis,
        size=point.size,
        tokens=point.T,
        experts=point.E,
        layers=point.L,
        parameters=parameters,
        forward_ms=statistics.median(timing.forward for timing in timings) * 1e3,
        ms=statistics.median(timing.both for timing in timings) * 1e3,
        ratio=statistics.median(timing.both / least for timing, least in zip(timings, first, strict=True)),
    )
