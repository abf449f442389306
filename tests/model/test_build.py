"""Putting a model together: which layer is of which kind, and what the random draws are keyed by."""

import pytest
import torch

from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.layers import LayerNorm, RMSNorm, SwiGLU
from moe_train.model.moe.capacity import NO_LIMIT, CapacityLimit
from moe_train.model.moe.layer import MoELayer
from moe_train.model.moe.routers.base import InputJitter
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.model.moe.routers.sigmoid_topk import SigmoidTopKRouter
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from tests.model.small import VOCAB, small_config


def test_everything_is_on_the_meta_device():
    model = build_model(small_config(), VOCAB)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers())


def test_layers_are_those_of_the_configuration():
    config = small_config(num_layers=5, moe_layers=[0, 3], kv_layers=[0, 2], norm="layernorm", norm_position="post")
    model = build_model(config, VOCAB)
    assert [isinstance(block.feed_forward, MoELayer) for block in model.blocks] == [True, False, False, True, False]
    assert isinstance(model.blocks[1].feed_forward, SwiGLU)
    assert [block.mixer.key is not None for block in model.blocks] == [True, False, True, False, False]
    assert model.final_norm is None
    assert isinstance(model.blocks[0].mixer_norm, LayerNorm)
    assert isinstance(build_model(small_config(), VOCAB).final_norm, RMSNorm)
    assert model.blocks[0].mixer_norm is not model.blocks[0].feed_forward_norm


@pytest.mark.parametrize("router", [NoisyTopKRouter, SoftmaxTopKRouter])
def test_router_and_expert_sizes(router):
    name = {NoisyTopKRouter: "noisy_topk", SoftmaxTopKRouter: "softmax_topk"}[router]
    moe = {"num_experts": 6, "top_k": 3, "intermediate_size": 5, "router": name, "load_cv2_coef": 0.0}
    layer = build_model(small_config(moe=moe), VOCAB, placement=ExpertPlacement(1, 3)).blocks[1].feed_forward
    assert type(layer.router) is router
    assert (layer.router.top_k, layer.router.num_experts, layer.router.renormalize) == (3, 6, True)
    assert layer.router.gate.weight.shape == (6, 16)
    assert layer.experts.gate_up.shape == (2, 16, 10)
    assert layer.experts.down.shape == (2, 5, 16)
    assert (layer.experts.gate_up.first_expert, layer.experts.gate_up.num_experts) == (2, 6)


def test_noise_is_keyed_by_seed_and_layer_but_not_by_rank():
    def keys(seed, placement=None):
        model = build_model(small_config(moe_every=1), VOCAB, seed=seed, placement=placement)
        return [block.feed_forward.router.layer_key for block in model.blocks], model.token_key

    layers, tokens = keys(0)
    other_layers, other_tokens = keys(1)
    assert len({*layers, *other_layers}) == 8
    assert tokens != other_tokens
    assert keys(0, ExpertPlacement(1, 2)) == (layers, tokens)


def test_options_of_the_configuration_reach_their_places():
    moe = {
        "num_experts": 8,
        "top_k": 2,
        "intermediate_size": 5,
        "num_shared_experts": 3,
        "router": "sigmoid_topk",
        "renormalize_gates": False,
        "num_groups": 4,
        "top_k_groups": 2,
        "routed_scaling_factor": 2.5,
        "input_jitter": 0.1,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "capacity_scope": "micro_batch",
        "drop_policy": "position",
        "load_cv2_coef": 0,
        "bias_update_rate": 1e-3,
    }
    model = build_model(small_config(moe=moe), VOCAB, seed=4, measures=False)
    layer = model.blocks[1].feed_forward
    router = layer.router
    assert type(router) is SigmoidTopKRouter and not router.renormalize
    assert (router.num_groups, router.top_k_groups, router.scaling_factor) == (4, 2, 2.5)
    assert isinstance(router.options.jitter, InputJitter) and router.options.jitter.size == 0.1
    assert len({each.options.jitter.layer_key for each in model.routers}) == 2
    assert router.selection_bias.shape == (8,) and router.options.optional_sums == set()
    assert layer.capacity == CapacityLimit(1.5, 2.0, per_sequence=False, policy="position")
    assert layer.shared.gate_up.weight.shape == (2 * 3 * 5, 16) and layer.shared.down.weight.shape == (16, 15)
    assert [type(each) for each in model.routers] == [SigmoidTopKRouter] * 2


@pytest.mark.parametrize(
    ("moe", "measures", "sums"),
    [
        ({}, True, {"entropy", "squared_logsumexp", "agreement"}),
        ({"router": "softmax_topk"}, True, {"entropy", "squared_logsumexp"}),
        ({"switch_aux_coef": 0.1}, False, {"probability"}),
        (
            {"switch_aux_coef": 0.1, "switch_scope": "micro_batch"},
            True,
            {"probability", "entropy", "squared_logsumexp", "agreement"},
        ),
        ({"switch_aux_coef": 0.1, "switch_scope": "sequence"}, False, {"sequence_balance"}),
        ({"z_loss_coef": 0.1}, False, {"squared_logsumexp"}),
    ],
)
def test_only_sums_that_are_asked_for_are_formed(moe, measures, sums):
    model = build_model(small_config(moe={"num_experts": 4, **moe}), VOCAB, measures=measures)
    assert {router.options.optional_sums for router in model.routers} == {frozenset(sums)}


def test_switch_is_one_expert_with_its_plain_probability():
    moe = {"num_experts": 8, "top_k": 1, "router": "switch", "load_cv2_coef": 0}
    layer = build_model(small_config(moe=moe), VOCAB).blocks[1].feed_forward
    assert type(layer.router) is SoftmaxTopKRouter
    assert (layer.router.top_k, layer.router.renormalize) == (1, False)
    assert layer.capacity is NO_LIMIT and layer.shared is None and layer.router.options.jitter is None


def test_a_models_dtype_and_device_are_left_alone():
    build_model(small_config(), VOCAB)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"
