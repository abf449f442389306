"""Rows at the experts of a rank, estimated by sampling, because all ranks wait for the slowest.

Every step and layer draws the experts' shares of the assignments: even shares, or a Dirichlet distribution with a given
coefficient of variation. Every micro-batch then draws the assignments: a multinomial draw, in its normal approximation.
All groups of ranks have the same router, and so the same shares; their assignments differ.
Legend: N steps, L layers, E experts, K top_k, P ranks that share the experts, T tokens per rank.
"""

import math
from dataclasses import dataclass

import numpy as np

from moe_train.config.errors import UsageError
from moe_train.config.moe import MoEConfig
from moe_train.plan.layout import Layout, dispatch_hops
from moe_train.plan.shapes import ModelShape

_STEPS = 256  # sampled steps
_DRAWS = 8  # sampled micro-batches per step and layer
_LEAST_VARIATION = 1e-3  # a smaller coefficient of variation counts as even
_MOST_LAYERS = 16  # sampled layers; further layers repeat them


@dataclass(frozen=True)
class RowLoads:
    """Rows per layer and micro-batch at the experts of a rank.

    Attributes:
        kept: Share of the assignments that expert capacity keeps.
        mean_rows: Rows that the experts of a rank compute, in the mean.
        most_rows: Rows per layer of the rank that has most over all layers, not exceeded in 99 of 100 steps. It is for
            memory that is summed over layers.
        busiest_rows: Rows of the busiest rank in the busiest layer of a step, not exceeded in 99 of 100 steps.
        sent: Rows that a rank sends, one way, rows for itself included.
        most_arriving: Rows that arrive at the rank of most_rows.
        busiest_arriving: Rows that arrive at the rank of busiest_rows.
        overload_NL: Rows of the slowest rank divided by the mean rows, for each step and layer, averaged over
            micro-batches.
    """

    kept: float
    mean_rows: float
    most_rows: float
    busiest_rows: float
    sent: float
    most_arriving: float
    busiest_arriving: float
    overload_NL: np.ndarray


def row_loads(
    shape: ModelShape,
    layout: Layout,
    imbalance: float = 0.0,
    seed: int = 0,
    shares_LE: np.ndarray | None = None,
) -> RowLoads:
    """Sample the rows at the experts of a rank.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
        imbalance: Coefficient of variation of the experts' shares; 0 is even, 1 as with Dirichlet(1).
        seed: Seed of the draws.
        shares_LE: Shares of the experts in every MoE layer, used instead of draws; rows sum to 1.

    Raises:
        UsageError: If no loads can vary as much as imbalance, or the shares are those of another model.
    """
    moe = shape.config.moe
    _check(shape, imbalance, shares_LE)
    if shape.num_moe_layers == 0:
        return RowLoads(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, np.ones((_STEPS, 0)))
    draws = np.random.default_rng(seed)
    num_layers = min(shape.num_moe_layers, _MOST_LAYERS)
    if shares_LE is not None:
        num_layers = len(shares_LE)
        shares_NLE = np.broadcast_to(shares_LE, (_STEPS, *shares_LE.shape))
    else:
        shares_NLE = draw_shares(draws, (_STEPS, num_layers), moe.num_experts, moe.top_k, imbalance)
    kept_NLE = shares_NLE * _kept_share(shares_NLE, moe, layout)
    kept = float(kept_NLE.sum(2).mean())
    mean_rows = layout.tokens * moe.top_k * kept
    overload_NL, most, busiest = np.ones((_STEPS, num_layers)), 1.0, 1.0
    if layout.ep_size > 1:
        overload_NL, most, busiest = _overloads(draws, kept_NLE, kept, moe, layout)
    one_way = mean_rows
    if layout.ep_size > 1:
        last = dispatch_hops(shape.config.moe, layout, mean_rows)[-1]
        one_way = last.rows * last.num_ranks
    rows, arriving = ((most * mean, busiest * mean) for mean in (mean_rows, one_way))
    return RowLoads(kept, mean_rows, *rows, one_way, *arriving, overload_NL)


def _check(shape: ModelShape, imbalance: float, shares_LE: np.ndarray | None) -> None:
    layers, experts, top_k = shape.num_moe_layers, shape.config.moe.num_experts, shape.config.moe.top_k
    if shares_LE is not None and shares_LE.shape != (layers, experts):
        raise UsageError(
            f"--loads: is of a run with {shares_LE.shape[0]} MoE layers of {shares_LE.shape[1]} experts; the model has "
            f"{layers} of {experts}"
        )
    # No expert has more than 1/K of the assignments. So the variation is largest where K experts have all of them.
    most = math.sqrt(experts / top_k - 1)
    if imbalance > 0 and (layers == 0 or imbalance >= most):
        raise UsageError(
            f"--imbalance ({imbalance:g}) must be below sqrt(num_experts / top_k - 1) ({most:.3g}), which loads of "
            f"{experts} experts of which a token takes {top_k} cannot reach"
            if layers
            else f"--imbalance ({imbalance:g}) has no effect: the model has no MoE layer"
        )


def draw_shares(
    draws: np.random.Generator, sizes: tuple[int, ...], num_experts: int, top_k: int, variation: float
) -> np.ndarray:
    """Draw the experts' shares of the assignments from a Dirichlet distribution.

    The squared coefficient of variation of Dirichlet(a) is (E - 1) / (E a + 1).

    Args:
        draws: Random generator.
        sizes: Dimensions before E.
        num_experts: E, number of experts.
        top_k: K, experts per token; no expert can have more than 1/K of the assignments.
        variation: Coefficient of variation before this bound is applied.

    Returns:
        [..., E], shares that sum to 1 over E.
    """
    if variation < _LEAST_VARIATION or num_experts == 1:
        return np.full((*sizes, num_experts), 1 / num_experts)
    concentration = max(1e-3, ((num_experts - 1) / variation**2 - 1) / num_experts)
    shares = draws.gamma(concentration, size=(*sizes, num_experts)) + 1e-12
    shares /= shares.sum(-1, keepdims=True)
    shares = np.minimum(shares, 1 / top_k)
    room = 1 / top_k - shares  # the excess over the bound goes to the other experts, in proportion to their room
    left = 1 - shares.sum(-1, keepdims=True)
    return shares + left * room / np.maximum(room.sum(-1, keepdims=True), 1e-12)


def _kept_share(shares_NLE: np.ndarray, moe: MoEConfig, layout: Layout) -> np.ndarray:
    """Compute the share of each expert's assignments that its capacity keeps: E[min(X, c)] / E[X], X normal."""
    if moe.capacity_factor is None:
        return np.ones_like(shares_NLE)
    tokens = layout.sequence_length if moe.capacity_scope == "sequence" else layout.tokens
    room = math.ceil(moe.capacity_factor * tokens * moe.top_k / moe.num_experts)
    chosen = np.minimum(shares_NLE * moe.top_k, 1.0)
    mean, deviation = tokens * chosen, np.sqrt(np.maximum(tokens * chosen * (1 - chosen), 1e-9))
    z = (mean - room) / deviation
    below = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    over = (mean - room) * below + deviation * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.clip(1 - over / np.maximum(mean, 1e-9), 0.0, 1.0)


def _overloads(
    draws: np.random.Generator, kept_NLE: np.ndarray, kept: float, moe: MoEConfig, layout: Layout
) -> tuple[np.ndarray, float, float]:
    """Sample the rows of ranks, divided by the mean rows.

    Returns:
        The slowest rank's rows by step and layer, [N, L]. The rows of the rank that has most over all layers, and of
        the busiest rank in its busiest layer, both not exceeded in 99 of 100 steps.
    """
    steps, layers, _ = kept_NLE.shape
    ranks, tokens = layout.ep_size, layout.tokens * layout.ep_size
    chosen = np.minimum(kept_NLE * moe.top_k, 1.0)
    shape_NLP = (steps, layers, ranks)
    mean_NLP = tokens * chosen.reshape(*shape_NLP, -1).sum(3)
    deviation_NLP = np.sqrt(tokens * (chosen * (1 - chosen)).reshape(*shape_NLP, -1).sum(3))
    even = tokens * moe.top_k * kept / ranks
    worst = np.empty((_DRAWS, steps, layers))
    totals = np.zeros((steps, ranks))
    for number in range(_DRAWS):
        rows_NLP = np.maximum(mean_NLP + deviation_NLP * draws.standard_normal(shape_NLP, dtype=np.float32), 0.0)
        worst[number] = rows_NLP.max(2)
        totals = np.maximum(totals, rows_NLP.sum(1))
    overload_NL, spread_NL = worst.mean(0) / even, worst.std(0) / even
    # The slowest of several groups counts. The largest of n normal draws is sqrt(2 ln n) deviations above the mean.
    groups = layout.edp_size
    if groups > 1:
        away = math.sqrt(2 * math.log(groups))
        overload_NL = overload_NL + away * spread_NL / math.sqrt(max(1, layout.accumulation) * layers)
    most = float(np.quantile(totals.max(1), 0.99)) / (even * layers)
    busiest = float(np.quantile(worst.max((0, 2)), 0.99)) / even
    return np.maximum(overload_NL, 1.0), max(1.0, most), max(1.0, busiest)
