"""How many rows the experts of a rank get, by sampling: the slowest rank makes all others wait.

Every step and layer draws the experts' shares of the assignments (evenly, or from a Dirichlet distribution with a given
coefficient of variation), every micro-batch the assignments: a multinomial draw, in its normal approximation. The
shares are the same for all groups of ranks, since the router is; what is drawn from them is not.
Legend: N steps, L layers, E experts, K top_k, P ranks that share the experts, T tokens of a rank.
"""

import math
from dataclasses import dataclass

import numpy as np

from moe_train.config.errors import UsageError
from moe_train.config.moe import MoEConfig
from moe_train.plan.layout import Layout
from moe_train.plan.shapes import ModelShape, share_reached

_STEPS = 256  # that are sampled
_DRAWS = 8  # micro-batches of each step and layer
_LEAST_VARIATION = 1e-3  # less is even
_MOST_LAYERS = 16  # that are sampled for themselves; more are repeats of these


@dataclass(frozen=True)
class RowLoads:
    """Rows of one layer and micro-batch on a rank.

    Attributes:
        kept: Share of the assignments that capacity leaves.
        mean_rows: Assignments that a rank's experts compute, in the mean.
        most_rows: Of the rank with most over all layers, the mean of a layer, in 99 of 100 steps: what stays is summed.
        busiest_rows: Of the rank with most in one layer, the busiest of a step, in 99 of 100 steps.
        sent: Rows that a rank sends, one way, those for itself included.
        most_arriving: Rows that arrive at the rank of most_rows.
        busiest_arriving: Rows that arrive at the rank of busiest_rows.
        overload_NL: The slowest rank's rows over the mean, of each step and layer, mean over its micro-batches.
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
    """Sample.

    Args:
        shape: The model.
        layout: Of the run.
        imbalance: Coefficient of variation of the experts' shares: 0 is even, 1 as with Dirichlet(1).
        seed: Of the draws.
        shares_LE: Shares of every MoE layer in place of draws; rows sum to 1.

    Raises:
        UsageError: If no loads vary as much, or the shares are of another model.
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
    if layout.dispatch != "flat" and layout.ep_size > 1:
        behind = moe.num_experts // layout.ep_size
        one_way = layout.tokens * layout.ep_size * share_reached(moe.num_experts, behind, moe.top_k)
    rows, arriving = ((most * mean, busiest * mean) for mean in (mean_rows, one_way))
    return RowLoads(kept, mean_rows, *rows, one_way, *arriving, overload_NL)


def _check(shape: ModelShape, imbalance: float, shares_LE: np.ndarray | None) -> None:
    layers, experts, top_k = shape.num_moe_layers, shape.config.moe.num_experts, shape.config.moe.top_k
    if shares_LE is not None and shares_LE.shape != (layers, experts):
        raise UsageError(
            f"--loads: is of a run with {shares_LE.shape[0]} MoE layers of {shares_LE.shape[1]} experts; the model has "
            f"{layers} of {experts}"
        )
    # No expert has more than 1/K of the assignments: K experts with all of them vary most.
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
    """Shares of the assignments. Of Dirichlet(a) the squared coefficient of variation is (E - 1) / (E a + 1).

    Args:
        draws: The generator.
        sizes: In front of E.
        num_experts: E.
        top_k: K: no expert can have more than 1/K of the assignments.
        variation: Coefficient of variation before that bound.

    Returns:
        [..., E], sums of 1.
    """
    if variation < _LEAST_VARIATION or num_experts == 1:
        return np.full((*sizes, num_experts), 1 / num_experts)
    concentration = max(1e-3, ((num_experts - 1) / variation**2 - 1) / num_experts)
    shares = draws.gamma(concentration, size=(*sizes, num_experts)) + 1e-12
    shares /= shares.sum(-1, keepdims=True)
    shares = np.minimum(shares, 1 / top_k)
    room = 1 / top_k - shares  # what was over the bound goes to the others, by the room that they have
    left = 1 - shares.sum(-1, keepdims=True)
    return shares + left * room / np.maximum(room.sum(-1, keepdims=True), 1e-12)


def _kept_share(shares_NLE: np.ndarray, moe: MoEConfig, layout: Layout) -> np.ndarray:
    """Of each expert's assignments, the share that its capacity leaves: E[min(X, c)] / E[X], X normal."""
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
    """Rows over the mean: the slowest rank's by step and layer; the busiest rank's over all layers, and in its busiest
    layer, in 99 of 100 steps."""
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
    # Of several groups the slowest counts: the largest of n normal draws is sqrt(2 ln n) deviations away.
    groups = layout.edp_size
    if groups > 1:
        away = math.sqrt(2 * math.log(groups))
        overload_NL = overload_NL + away * spread_NL / math.sqrt(max(1, layout.accumulation) * layers)
    most = float(np.quantile(totals.max(1), 0.99)) / (even * layers)
    busiest = float(np.quantile(worst.max((0, 2)), 0.99)) / even
    return np.maximum(overload_NL, 1.0), max(1.0, most), max(1.0, busiest)
