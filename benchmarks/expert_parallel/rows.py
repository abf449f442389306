"""Rows of the expert_parallel benchmark: formulas of the bytes, medians of the times, and what they show.

Legend: T tokens of a rank, K top_k, E experts, e experts of a rank, P ranks, D hidden_size.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.runner.rounds import quartiles, round_ratios

PARTS = ("route", "dispatch", "experts", "combine", "backward", "optimizer")
LEAST_SAVED = 0.25  # of flat's bytes
TOLERANCE = 1e-5  # of fp32 sums of a few hundred terms in another order


@dataclass(frozen=True)
class Variant:
    """A way for tokens to travel.

    Attributes:
        dispatch: Name of the dispatch.
        chunks: Number of chunks in which they travel.
        payload: Form in which they travel.
    """

    dispatch: str
    chunks: int
    payload: str

    @property
    def name(self) -> str:
        """Name of the variant, made of all three."""
        return f"{self.dispatch}/{self.chunks}/{self.payload}"


REFERENCE = Variant("flat", 1, "model")


@dataclass(frozen=True)
class Shape:
    """What every rank computes.

    Attributes:
        tokens: T, tokens of one rank.
        hidden: D, width of a token's row.
        inner: Intermediate width of one expert.
        experts: E, experts of all ranks together.
        top_k: K, experts of a token.
        rounds: Timed steps of each variant.
        seed: Seed of weights and tokens.
        nodes: Nodes among which ranks are divided, where their number allows it; real ones where link_mbit is given.
        link_mbit: Megabits per second of each node's link; 0: there is no network between ranks.
        dispatch: Names of dispatches to measure.
        chunks: Numbers of chunks to measure.
        payload: Forms of rows to measure.
    """

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    rounds: int
    seed: int
    nodes: int
    link_mbit: float
    dispatch: tuple[str, ...]
    chunks: tuple[int, ...]
    payload: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row, fp32."""
        return self.hidden * 4

    def node_size(self, ranks: int) -> int:
        """Ranks of a node; all of them where they cannot be divided."""
        return ranks // self.nodes if ranks % self.nodes == 0 else ranks

    def variants_on(self, ranks: int) -> list[Variant]:
        """Variants that are measured on some ranks, the reference first.

        On one rank nothing travels; two_level needs several nodes of several ranks.
        """
        if ranks == 1:
            return [REFERENCE]
        has_two_levels = 1 < self.node_size(ranks) < ranks
        names = [name for name in self.dispatch if name != "two_level" or has_two_levels]
        found = [Variant(*each) for each in itertools.product(names, self.chunks, self.payload)]
        return [REFERENCE, *(variant for variant in found if variant != REFERENCE)]


@dataclass(frozen=True)
class Sent:
    """Bytes to other ranks in one step, summed over ranks.

    Attributes:
        across: Token rows between nodes, there and back, forward pass.
        within: Token rows inside of nodes, there and back, forward pass.
        metadata: All else of the forward pass: counts, gates, places.
        backward: Everything of the backward pass.
    """

    across: int
    within: int
    metadata: int
    backward: int

    @property
    def rows(self) -> int:
        """Token rows, forward pass."""
        return self.across + self.within


@dataclass(frozen=True)
class Turn:
    """One step of one variant.

    Attributes:
        seconds: Time by part, and of `step` and `exchange` (starting and waiting for all-to-alls), each of the slowest
            rank.
        sent: Measured bytes.
        drawn: By dispatch, rows that it has to send one way for the routing of this step, across and within nodes.
        difference: Relative difference from the reference's outputs and gradients; None where it was not compared.
    """

    seconds: dict[str, float]
    sent: Sent
    drawn: dict[str, tuple[int, int]]
    difference: float | None


@dataclass(frozen=True)
class RowResult:
    """A row of the table. Times are medians over rounds, of the slowest rank in each.

    Attributes:
        dispatch: Name of the dispatch.
        chunks: Number of chunks in which tokens travel.
        payload: Form in which they travel.
        ranks: P, number of ranks.
        bytes: Measured token rows to other ranks in a forward pass, there and back, all ranks.
        across_bytes: Part of those rows that goes between nodes.
        metadata_bytes: Measured counts, gates and places to other ranks in a forward pass, all ranks.
        backward_bytes: Measured rows and gates to other ranks in a backward pass, all ranks.
        formula_bytes: Token rows calculated from the routing of the same step.
        expected_bytes: Token rows calculated for uniform routing.
        formula_holds: Whether measured and calculated rows were the same bytes in every step, across nodes too.
        step_ms: Forward pass, backward pass and update.
        exchange_ms: Starting all-to-alls of both passes and waiting for them.
        route_ms: Routing, forward pass.
        dispatch_ms: Dispatch, forward pass.
        experts_ms: Experts, forward pass.
        combine_ms: Combine, forward pass.
        backward_ms: Backward pass of all four.
        optimizer_ms: Adding up the router's gradients over ranks, and AdamW.
        speed_over_flat: Median over rounds of the reference's step time divided by this.
        speed_quartiles: Lower and upper quartile of those ratios.
        difference: Largest relative difference of an output or gradient from the reference's.
    """

    dispatch: str
    chunks: int
    payload: str
    ranks: int
    bytes: int
    across_bytes: int
    metadata_bytes: int
    backward_bytes: int
    formula_bytes: int
    expected_bytes: float
    formula_holds: bool
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


def count_rows(experts: Sequence[Sequence[int]], own_rank: int, shape: Shape, ranks: int) -> dict[str, tuple[int, int]]:
    """Rows that a rank's tokens need, one way, across and within nodes, by dispatch.

    flat: an assignment each. unique: a pair of token and rank each. two_level: a pair of token and node each, and in
    each node, from the rank that has the sender's place there, a pair of token and rank each.

    Args:
        experts: K experts of each token of the rank.
        own_rank: Rank whose rows are counted.
        shape: Sizes of the layer.
        ranks: P, number of ranks.
    """
    size, experts_per_rank = shape.node_size(ranks), shape.experts // ranks
    node, place = divmod(own_rank, size)
    found = {name: [0, 0] for name in ("flat", "unique", "two_level")}

    def add(name: str, to_node: int) -> None:
        found[name][to_node == node] += 1

    for chosen in experts:
        everywhere = [expert // experts_per_rank for expert in chosen]
        for rank in everywhere:
            if rank != own_rank:
                add("flat", rank // size)
        for rank in set(everywhere) - {own_rank}:
            add("unique", rank // size)
        found["two_level"][0] += len({rank // size for rank in everywhere} - {node})
        found["two_level"][1] += sum(rank % size != place for rank in set(everywhere))
    return {name: (across, within) for name, (across, within) in found.items()}


def expected_rows(dispatch: str, shape: Shape, ranks: int) -> float:
    """Rows to other ranks, one way, all ranks, for uniform routing.

    flat: P T K (1 - 1/P). unique: P T (P - 1) (1 - C(E-e, K) / C(E, K)). two_level: P T ((N - 1) (1 - C(E-E/N, K) /
    C(E, K)) + (P - N) (1 - C(E-e, K) / C(E, K))) on N nodes.
    """
    if dispatch == "flat":
        return ranks * shape.tokens * shape.top_k * (1 - 1 / ranks)
    to_a_rank = _share_reached(shape, shape.experts // ranks)
    if dispatch == "unique":
        return ranks * shape.tokens * (ranks - 1) * to_a_rank
    nodes = ranks // shape.node_size(ranks)
    to_a_node = _share_reached(shape, shape.experts // nodes)
    return ranks * shape.tokens * ((nodes - 1) * to_a_node + (ranks - nodes) * to_a_rank)


def _share_reached(shape: Shape, experts: int) -> float:
    """Share of tokens that draw one of so many experts."""
    return 1 - math.comb(shape.experts - experts, shape.top_k) / math.comb(shape.experts, shape.top_k)


def payload_row_bytes(variant: Variant, shape: Shape) -> int:
    """Bytes of a token's row on its way."""
    return {"model": shape.row_bytes, "bf16": 2 * shape.hidden, "fp8": shape.hidden + 4}[variant.payload]


def result_row(
    variant: Variant, ranks: int, shape: Shape, turns: Sequence[Turn], reference: Sequence[Turn]
) -> RowResult:
    """Row of the table for a variant.

    Args:
        variant: Variant that was measured.
        ranks: P, number of ranks.
        shape: Sizes of the layer.
        turns: Steps of the variant: the first, which compares and warms up, then the timed ones.
        reference: Steps of the reference.
    """
    first, timed = turns[0], turns[1:]
    both_ways = 2 * payload_row_bytes(variant, shape)

    def formula(turn: Turn) -> tuple[int, int]:
        across, within = turn.drawn[variant.dispatch]
        return across * both_ways, within * both_ways

    flat_seconds, own_seconds = ([turn.seconds["step"] for turn in each[1:]] for each in (reference, turns))
    lower, median, upper = quartiles(round_ratios(flat_seconds, own_seconds), "exclusive")
    medians = {name: 1e3 * statistics.median(turn.seconds[name] for turn in timed) for name in timed[0].seconds}
    return RowResult(
        **asdict(variant),
        ranks=ranks,
        bytes=first.sent.rows,
        across_bytes=first.sent.across,
        metadata_bytes=first.sent.metadata,
        backward_bytes=first.sent.backward,
        formula_bytes=sum(formula(first)),
        expected_bytes=expected_rows(variant.dispatch, shape, ranks) * both_ways,
        formula_holds=all((turn.sent.across, turn.sent.within) == formula(turn) for turn in turns),
        speed_over_flat=median,
        speed_quartiles=(lower, upper),
        difference=max(turn.difference for turn in turns if turn.difference is not None),
        **{f"{name}_ms": value for name, value in medians.items()},
    )


def claims_of(rows: Sequence[RowResult], shape: Shape) -> list[dict[str, Any]]:
    """What the benchmark is to show, and whether this run of it does.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    wrong = [f"{row.dispatch} on {row.ranks} ranks" for row in rows if not row.formula_holds]
    words = "Every dispatch sends the rows of its formula for the routing drawn, to the byte, in every step"
    claims = [_claim(words + (f"; not {', '.join(wrong)}" if wrong else ""), not wrong)]
    most = max(row.ranks for row in rows)
    plain = [row for row in rows if row.ranks == most and row.payload == "model"]
    by_name = {row.dispatch: row for row in plain if row.chunks == 1}
    if "unique" in by_name:
        flat, unique = by_name["flat"], by_name["unique"]
        saved = 1 - unique.bytes / flat.bytes if flat.bytes else 0.0
        flat_all, unique_all = (row.bytes + row.metadata_bytes for row in (flat, unique))
        saved_all = 1 - unique_all / flat_all
        words = f"On {most} ranks unique sends at least {LEAST_SAVED:.0%} fewer bytes than flat: {saved:.1%} of rows"
        claims.append(_claim(f"{words}, {saved_all:.1%} with the metadata", min(saved, saved_all) >= LEAST_SAVED))
        claims.append(_speed_claim(f"On {most} ranks a step with unique is faster than with flat", flat, unique))
    if "two_level" in by_name and shape.link_mbit:
        best = {name: min((row for row in plain if row.dispatch == name), key=_step_ms) for name in by_name}
        words = "With the slow link between nodes two_level is the fastest, each with the best number of chunks"
        figures = ", ".join(
            f"{name} {row.step_ms:.0f} ms in {row.chunks} ({row.speed_over_flat:.2f} times as fast as flat in 1, "
            f"quartiles {row.speed_quartiles[0]:.2f} to {row.speed_quartiles[1]:.2f})"
            for name, row in best.items()
        )
        two_level = best.pop("two_level")
        is_fastest = all(
            two_level.step_ms < row.step_ms and two_level.speed_over_flat > row.speed_quartiles[1]
            for row in best.values()
        )
        claims.append(_claim(f"{words}: {figures}", is_fastest))
    difference = max(row.difference for row in rows if row.payload == "model")
    words = f"Outputs and gradients of all dispatches and chunks are the same within {TOLERANCE:g}, relative, in fp32"
    claims.append(_claim(f"{words}: {difference:.1e}", difference <= TOLERANCE))
    return claims


def _step_ms(row: RowResult) -> float:
    return row.step_ms


def _speed_claim(words: str, flat: RowResult, other: RowResult) -> dict[str, Any]:
    """A claim that holds where the medians of both say so, and three of four rounds do too."""
    low, high = other.speed_quartiles
    of_medians = flat.step_ms / other.step_ms
    figures = f"quartiles {low:.2f} to {high:.2f}; by the medians {of_medians:.2f}"
    return _claim(f"{words}: {other.speed_over_flat:.2f} times as fast ({figures})", min(low, of_medians) > 1)


def _claim(words: str, holds: bool) -> dict[str, Any]:
    return {"claim": f"{words}.", "holds": holds}
