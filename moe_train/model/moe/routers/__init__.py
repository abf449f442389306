"""Routers by their name in the configuration: one file and one line here each."""

from collections.abc import Callable

from moe_train.config.model import ModelConfig
from moe_train.model.moe.routers.base import InputJitter, Router, RouterOptions
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.model.moe.routers.sigmoid_topk import SigmoidTopKRouter
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.ops.keyed_random import make_key


def _noisy_topk(config: ModelConfig, layer: int, seed: int, options: RouterOptions) -> Router:
    moe, key = config.moe, make_key(seed, "router_noise", layer)
    sizes = config.hidden_size, moe.num_experts, moe.top_k
    return NoisyTopKRouter(*sizes, moe.noise_epsilon, moe.gates_sum_to_one, layer_key=key, options=options)


def _softmax_topk(config: ModelConfig, layer: int, seed: int, options: RouterOptions) -> Router:
    del layer, seed  # it draws nothing
    moe = config.moe
    sizes = config.hidden_size, moe.num_experts, moe.top_k
    return SoftmaxTopKRouter(*sizes, moe.gates_sum_to_one, config.init_std, options)


def _sigmoid_topk(config: ModelConfig, layer: int, seed: int, options: RouterOptions) -> Router:
    del layer, seed
    moe = config.moe
    return SigmoidTopKRouter(
        config.hidden_size,
        moe.num_experts,
        moe.top_k,
        moe.gates_sum_to_one,
        config.init_std,
        moe.num_groups,
        moe.top_k_groups or 1,
        moe.routed_scaling_factor,
        options,
    )


ROUTERS: dict[str, Callable[[ModelConfig, int, int, RouterOptions], Router]] = {
    "noisy_topk": _noisy_topk,
    "softmax_topk": _softmax_topk,
    "sigmoid_topk": _sigmoid_topk,
    "switch": _softmax_topk,  # with one expert and its plain probability, which the configuration sees to
}


def build_router(config: ModelConfig, layer: int, seed: int, measures: bool) -> Router:
    """The router of a layer.

    Args:
        config: The model section.
        layer: Index of the block.
        seed: Of the run.
        measures: Whether sums that only telemetry needs are formed.
    """
    moe = config.moe
    sums = {"entropy", "squared_logsumexp"} if measures else set()
    if moe.switch_aux_coef:
        sums.add("sequence_balance" if moe.switch_scope == "sequence" else "probability")
    if moe.z_loss_coef:
        sums.add("squared_logsumexp")
    jitter = InputJitter(moe.input_jitter, make_key(seed, "router_jitter", layer)) if moe.input_jitter else None
    return ROUTERS[moe.router](config, layer, seed, RouterOptions(jitter, moe.bias_update_rate > 0, frozenset(sums)))


__all__ = [
    "ROUTERS",
    "InputJitter",
    "NoisyTopKRouter",
    "Router",
    "RouterOptions",
    "SigmoidTopKRouter",
    "SoftmaxTopKRouter",
    "build_router",
]
