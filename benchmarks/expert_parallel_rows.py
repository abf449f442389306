"""The rows of benchmarks/expert_parallel.py: formulas of the bytes, medians of the times, and what they show.

Legend: T tokens of a rank, K top_k, E experts, e of a rank, P ranks, D hidden_size.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PARTS = ("route", "dispatch", "experts", "combine", "backward", "optimizer")
LEAST_SAVED = 0.25  # of flat's bytes
TOLERANCE = 1e-5  # of fp32 sums of a few hundred terms in another order
REFERENCE = "flat"


@dataclass(frozen=True)
class Shape:
    """What every rank computes.

    Attributes:
        tokens: T, of one rank.
        hidden: D.
        inner: Intermediate width of one expert.
        experts: E, of all ranks together.
        top_k: K.
        rounds: Timed steps of each dispatch.
        seed: Of weights and tokens.
        link_mbit: Megabits a second of each rank's slowed link; 0: not slowed.
    """

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    rounds: int
    seed: int
    link_mbit: float

    @property
    def row_bytes(self) -> int:
        """Of a token's row, fp32."""
        return self.hidden * 4


@dataclass(frozen=True)
class Sent:
    """Bytes to other ranks in one step, summed over ranks.

    Attributes:
        rows: Token rows there and back, forward pass.
        metadata: The rest of the forward pass: counts, gates, places.
        backward: All of the backward pass.
    """

    rows: int
    metadata: int
    backward: int


@dataclass(frozen=True)
class Turn:
    """One step of one dispatch.

    Attributes:
        seconds: By part, and `step` and `exchange` (in all-to-alls, waiting included): of the slowest rank in each.
        sent: Measured.
        flat_rows: Rows that flat has to send one way for the routing of this step.
        unique_rows: Likewise unique.
        difference: From the reference dispatch's outputs and gradients, relative; None where that was not compared.
    """

    seconds: dict[str, float]
    sent: Sent
    flat_rows: int
    unique_rows: int
    difference: float | None


@dataclass(frozen=True)
class RowResult:
    """A row of the table. Times are medians over rounds, of the slowest rank in each.

    Attributes:
        dispatch: Its name.
        ranks: P.
        bytes: Measured, sent to other ranks in a forward pass, all ranks: token rows, there and back.
        metadata_bytes: Likewise: counts, gates, places.
        backward_bytes: Likewise in a backward pass, rows and gates.
        formula_bytes: Calculated from the routing of the same step; None: no formula for this dispatch.
        expected_bytes: Calculated for uniform routing; None likewise.
        formula_holds: Whether measured and calculated rows were the same bytes in every step; None likewise.
        step_ms: Forward, backward, update.
        exchange_ms: In all-to-alls of both passes, waiting for other ranks included.
        route_ms: And the other parts of the step.
        dispatch_ms: Of the forward pass.
        experts_ms: Of the forward pass.
        combine_ms: Of the forward pass.
        backward_ms: Of all four.
        optimizer_ms: The router's gradients added up over ranks, and AdamW.
        speed_over_flat: Median of the rounds' ratios of flat's step time to this.
        speed_quartiles: The quartiles of those.
        difference: Largest relative difference of an output or gradient from flat's.
    """

    dispatch: str
    ranks: int
    bytes: int
    metadata_bytes: int
    backward_bytes: int
    formula_bytes: int | None
    expected_bytes: float | None
    formula_holds: bool | None
    step_ms: float
    exchange_ms: float
    route_ms: float
    dispatch_ms: float
    experts_ms: float
    combine_ms: float
    backward_ms: float
    optimizer_ms: float
    speed_over_flat: float
    speed_quartiles: tuple[float, float]
    difference: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def count_rows(experts: Sequence[Sequence[int]], own_rank: int, experts_per_rank: int) -> tuple[int, int]:
    """Rows that one rank must send to others, one way: an assignment each, and a pair of token and rank each.

    Args:
        experts: The K experts of each token of the rank.
        own_rank: The rank.
        experts_per_rank: e.
    """
    flat = unique = 0
    for chosen in experts:
        elsewhere = [rank for rank in (expert // experts_per_rank for expert in chosen) if rank != own_rank]
        flat += len(elsewhere)
        unique += len(set(elsewhere))
    return flat, unique


def expected_flat_rows(shape: Shape, ranks: int) -> float:
    """Rows to other ranks, one way, all ranks: P T K (1 - 1/P)."""
    return ranks * shape.tokens * shape.top_k * (1 - 1 / ranks)


def expected_unique_rows(shape: Shape, ranks: int) -> float:
    """Rows to other ranks, one way, all ranks, for uniform routing: P T (P - 1) (1 - C(E-e, K) / C(E, K))."""
    elsewhere = shape.experts - shape.experts // ranks
    missed = math.comb(elsewhere, shape.top_k) / math.comb(shape.experts, shape.top_k)
    return ranks * shape.tokens * (ranks - 1) * (1 - missed)


# Of the dispatches that have a formula: rows for the routing of a step, and for uniform routing.
FORMULAS: dict[str, tuple[Callable[[Turn], int], Callable[[Shape, int], float]]] = {
    "flat": (lambda turn: turn.flat_rows, expected_flat_rows),
    "unique": (lambda turn: turn.unique_rows, expected_unique_rows),
}


def result_row(dispatch: str, ranks: int, shape: Shape, turns: Sequence[Turn], reference: Sequence[Turn]) -> RowResult:
    """A row.

    Args:
        dispatch: Its name.
        ranks: P.
        shape: Of the layer.
        turns: Its steps: the first, which compares and warms up, then the timed ones.
        reference: Those of flat.
    """
    first, timed = turns[0], turns[1:]
    both_ways = 2 * shape.row_bytes
    formula, expected, holds = None, None, None
    if dispatch in FORMULAS:
        drawn, uniform = FORMULAS[dispatch]
        formula, expected = drawn(first) * both_ways, uniform(shape, ranks) * both_ways
        holds = all(turn.sent.rows == drawn(turn) * both_ways for turn in turns)
    ratios = [theirs.seconds["step"] / ours.seconds["step"] for ours, theirs in zip(timed, reference[1:], strict=True)]
    speeds = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    medians = {name: 1e3 * statistics.median(turn.seconds[name] for turn in timed) for name in timed[0].seconds}
    return RowResult(
        dispatch=dispatch,
        ranks=ranks,
        bytes=first.sent.rows,
        metadata_bytes=first.sent.metadata,
        backward_bytes=first.sent.backward,
        formula_bytes=formula,
        expected_bytes=expected,
        formula_holds=holds,
        speed_over_flat=speeds[1],
        speed_quartiles=(speeds[0], speeds[2]),
        difference=max(turn.difference for turn in turns if turn.difference is not None),
        **{f"{name}_ms": value for name, value in medians.items()},
    )


def claims_of(rows: Sequence[RowResult]) -> list[dict[str, Any]]:
    """What the experiment is to show, and whether this run of it does.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    claims = []
    for name in FORMULAS:
        own = [row for row in rows if row.dispatch == name]
        if own:
            wrong = [str(row.ranks) for row in own if not row.formula_holds]
            words = f"{name} sends the rows of the formula for the routing drawn, to the byte, in every step"
            claims.append(_claim(words + (f"; not on {', '.join(wrong)} ranks" if wrong else ""), not wrong))
    most = max(row.ranks for row in rows)
    if most > 1:
        at_most = {row.dispatch: row for row in rows if row.ranks == most}
        flat, unique = at_most[REFERENCE], at_most["unique"]
        saved = 1 - unique.bytes / flat.bytes if flat.bytes else 0.0
        flat_all, unique_all = (row.bytes + row.metadata_bytes for row in (flat, unique))
        words = f"On {most} ranks unique sends at least {LEAST_SAVED:.0%} fewer bytes of rows than flat: {saved:.1%}"
        claims.append(_claim(f"{words} ({1 - unique_all / flat_all:.1%} with the metadata)", saved >= LEAST_SAVED))
        claims.append(_speed_claim(most, flat, unique))
    difference = max(row.difference for row in rows)
    words = f"Outputs and gradients of all dispatches are the same within {TOLERANCE:g}, relative, in fp32"
    claims.append(_claim(f"{words}: {difference:.1e}", difference <= TOLERANCE))
    return claims


def _speed_claim(ranks: int, flat: RowResult, unique: RowResult) -> dict[str, Any]:
    """Only where the medians of both say so as well, and the rounds' own ratios do in three of four."""
    low, high = unique.speed_quartiles
    of_medians = flat.step_ms / unique.step_ms
    words = (
        f"On {ranks} ranks a step with unique is faster than with flat: {unique.speed_over_flat:.2f} times as fast "
        f"(quartiles {low:.2f} to {high:.2f}; by the medians {of_medians:.2f})"
    )
    return _claim(words, min(low, of_medians) > 1)


def _claim(words: str, holds: bool) -> dict[str, Any]:
    return {"claim": f"{words}.", "holds": holds}
