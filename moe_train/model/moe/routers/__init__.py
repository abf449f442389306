"""Routers by their name in the configuration: one file and one line here each."""

from collections.abc import Callable

from moe_train.config.model import ModelConfig
from moe_train.model.moe.routers.base import Router
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.ops.keyed_random import make_key


def _noisy_topk(config: ModelConfig, layer: int, seed: int) -> Router:
    moe, key = config.moe, make_key(seed, "router_noise", layer)
    return NoisyTopKRouter(
        config.hidden_size, moe.num_experts, moe.top_k, moe.noise_epsilon, moe.renormalize_gates, layer_key=key
    )


def _softmax_topk(config: ModelConfig, layer: int, seed: int) -> Router:
    del layer, seed  # it draws nothing
    moe = config.moe
    return SoftmaxTopKRouter(config.hidden_size, moe.num_experts, moe.top_k, moe.renormalize_gates, config.init_std)


ROUTERS: dict[str, Callable[[ModelConfig, int, int], Router]] = {
    "noisy_topk": _noisy_topk,
    "softmax_topk": _softmax_topk,
}

__all__ = ["ROUTERS", "NoisyTopKRouter", "Router", "SoftmaxTopKRouter"]
