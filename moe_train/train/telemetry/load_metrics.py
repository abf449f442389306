"""Ratios of a window's global sums: how the experts of each MoE layer share the work.

Legend: L MoE layers, E experts, W ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_train.model.moe.balance.cv_squared import cv_squared
from moe_train.model.moe.expert_information import clean_kappa
from moe_train.model.moe.steps import RoutingSums
from moe_train.train.telemetry.metrics_window import GlobalWindow
from moe_train.train.telemetry.records import EXPERT_FIGURES, Record, by_layer


def max_violation(counts: Tensor) -> Tensor:
    """Compute MaxVio = max(c) / mean(c) - 1 over the last dimension, [..., E] -> [...].

    Source: Wang et al. 2024, arXiv 2408.15664.
    """
    return _max_over_mean(counts) - 1.0


def routing_record(window: GlobalWindow, layers: Sequence[int], copies: int = 1, noisy_top_k: int = 0) -> Record:
    """Compute balance figures of each MoE layer and the worst one, tokens of every expert, and rows of every rank.

    Args:
        window: Window with global sums.
        layers: Index in the model of each MoE layer.
        copies: Copies of every token; all figures count hidden copies as tokens.
        noisy_top_k: K of routers that draw noise; 0: they draw none.

    Returns:
        moe/max_violation, moe/importance_cv2, moe/load_cv2: no unit. moe/router_entropy: nats per token.
        moe/dropped_fraction: share of the assignments. moe/rank_overload: rows of the rank with most rows, over the
        mean. moe/z_loss: mean squared logsumexp of the logits, without its coefficient. moe/counts/layer_NN:
        assignments of every expert in moe/steps steps, dropped ones included. moe/rank_rows/layer_NN: rows that every
        rank computed. moe/all_to_all_ms and moe/all_to_all_bytes: means per step, see `GlobalWindow`.
        With noise, moe/clean_agreement: share of the assignments that the router would have made without its noise too;
        moe/clean_kappa: the same, scaled so that dice have 0; not if K is the number of experts. The worst layer is the
        lowest. With hidden copies, moe/assignments_with_copies: assignments of all layers per step; moe/copies: copies.
    """
    sums = window.sums
    per_layer = layer_figures(sums) | {"moe/rank_overload": _max_over_mean(window.rows_LW)}
    record: Record = {name: worst(per_layer[name].tolist()) for name, worst in EXPERT_FIGURES.items()}
    for name, values in per_layer.items():
        record |= by_layer(name, values.tolist(), layers)
    record |= by_layer("moe/counts", sums.counts.long().tolist(), layers)
    record |= by_layer("moe/rank_rows", window.rows_LW.long().tolist(), layers)
    if noisy_top_k:
        for name, values in agreement_figures(sums, noisy_top_k).items():
            record |= {name: min(values.tolist())} | by_layer(name, values.tolist(), layers)
    if copies > 1:
        per_step = int(sums.counts.sum()) / window.num_steps
        record |= {"moe/assignments_with_copies": per_step, "moe/copies": copies}
    return record | {
        "moe/steps": window.num_steps,
        "moe/all_to_all_ms": window.all_to_all_seconds * 1e3,
        "moe/all_to_all_bytes": window.all_to_all_bytes,
    }


def layer_figures(sums: RoutingSums) -> dict[str, Tensor]:
    """Compute the figures of each layer from global sums, by their names in a record. fp64 [L] each."""
    assignments_L, tokens_L = sums.counts.sum(-1).clamp(min=1), sums.tokens.clamp(min=1)
    return {
        "moe/max_violation": max_violation(sums.counts),
        "moe/importance_cv2": cv_squared(sums.importance),
        "moe/load_cv2": cv_squared(sums.load),
        "moe/router_entropy": sums.entropy / tokens_L,
        "moe/dropped_fraction": sums.dropped.sum(-1) / assignments_L,
        "moe/z_loss": sums.squared_logsumexp / tokens_L,
    }


def agreement_figures(sums: RoutingSums, top_k: int) -> dict[str, Tensor]:
    """Compute from global sums how far noise decides the choice of each layer, by names in a record. fp64 [L] each."""
    agreement = sums.agreement / sums.counts.sum(-1).clamp(min=1)
    num_experts, figures = sums.counts.shape[-1], {"moe/clean_agreement": agreement}
    if top_k < num_experts:
        figures["moe/clean_kappa"] = clean_kappa(agreement, top_k, num_experts)
    return figures


def _max_over_mean(values: Tensor) -> Tensor:
    return values.amax(-1) / values.mean(-1).clamp(min=torch.finfo(values.dtype).tiny)
