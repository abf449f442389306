"""Model settings: what must fit together, and which layers are of which kind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_train.config.model import MIXER_FIELDS, ModelConfig
from moe_train.config.moe import MoEConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({"hidden_size": 100}, ["hidden_size (100)", "num_heads (8)"], id="heads do not divide"),
        pytest.param({"hidden_size": 24}, ["head_dim (3)", "even"], id="odd head, from the width"),
        pytest.param({"head_dim": 5}, ["head_dim (5)", "even"], id="odd head"),
        pytest.param({"num_kv_heads": 3}, ["num_heads (8)", "num_kv_heads (3)"], id="groups do not divide"),
        pytest.param({"num_kv_heads": 16}, ["num_heads (8)", "num_kv_heads (16)"], id="more groups than heads"),
        pytest.param({"moe_layers": [1, 4]}, ["moe_layers ([1, 4])", "3"], id="MoE layer beyond the last"),
        pytest.param({"moe_layers": [2, 1]}, ["moe_layers ([2, 1])", "increasing"], id="MoE layers not in order"),
        pytest.param({"moe_layers": [1, 1]}, ["moe_layers ([1, 1])", "increasing"], id="MoE layer twice"),
        pytest.param({"moe_layers": [-1]}, ["moe_layers ([-1])"], id="negative layer"),
        pytest.param({"moe_layers": [1], "moe_every": 1}, ["moe_every (1)", "moe_layers ([1])"], id="both given"),
        pytest.param({"kv_layers": 5}, ["kv_layers (5)", "num_layers (4)"], id="more owners than layers"),
        pytest.param({"kv_layers": 0}, ["kv_layers"], id="no owner"),
        pytest.param({"kv_layers": [1, 2]}, ["kv_layers ([1, 2])", "layer 0"], id="first owner above 0"),
        pytest.param({"kv_layers": []}, ["kv_layers ([])", "layer 0"], id="no owners"),
        pytest.param({"kv_layers": [0, 4]}, ["kv_layers ([0, 4])", "3"], id="owner beyond the last"),
        pytest.param({"moe_every": 0, "moe": {"top_k": 3}}, ["model.moe has no effect", "moe_every (0)"], id="no MoE"),
        pytest.param(
            {"moe_every": 5, "moe": {"top_k": 3}}, ["model.moe has no effect", "moe_every (5)"], id="too few layers"
        ),
        pytest.param({"moe_every": -1}, ["moe_every"], id="negative moe_every"),
        pytest.param({"hidden_copies": {"copies": 0}}, ["hidden_copies", "copies"], id="no copy"),
        pytest.param(
            {"hidden_copies": {"window_positions": 4}}, ["window_positions (4)", "copies (1)"], id="window of one copy"
        ),
        pytest.param(
            {"hidden_copies": {"copies": 2, "chunk": 8}}, ["chunk (8)", "window_positions (0)"], id="chunk, no window"
        ),
        pytest.param(
            {"hidden_copies": {"copies": 2, "window_positions": 2, "chunk": 1}}, ["chunk"], id="chunk of one position"
        ),
        pytest.param(
            {"hidden_copies": {"copies": 2}, "moe": {"capacity_factor": 1.5}},
            ["moe.capacity_factor (1.5)", "hidden_copies.copies (2)"],
            id="copies and a capacity",
        ),
        pytest.param(
            {"hidden_copies": {"copies": 2}, "moe": {"eval_capacity_factor": 2.0}},
            ["moe.eval_capacity_factor (2.0)", "hidden_copies.copies (2)"],
            id="copies and a capacity in evaluation",
        ),
        pytest.param({"init_std": 0}, ["init_std"], id="no spread"),
        pytest.param({"mixers": ["attention", "ttt"]}, ["mixers ('ttt')", "not known"], id="no such mixer"),
        pytest.param({"mixer": "rwkv"}, ["mixer ('rwkv')", "rwkv"], id="no such mixer of all layers"),
        pytest.param(
            {"mixer": "rwkv4", "mixers": ["rwkv7"]}, ["mixer ('rwkv4')", "mixers (['rwkv7'])"], id="mixer and mixers"
        ),
        pytest.param(
            {"mixers": ["attention", "rwkv4", "rwkv7"]}, ["num_layers (4)", "mixers", "rwkv7"], id="uneven pattern"
        ),
        pytest.param({"infini": {"segment_length": 8}}, ["infini", "mixers (['attention'])"], id="not in the pattern"),
        pytest.param({"mixer": "rwkv4", "kv_layers": 1}, ["kv_layers (1)", "rwkv4"], id="owners without attention"),
        pytest.param(
            {"sliding_window": 9, "window_pattern": [4, None]},
            ["sliding_window (9)", "window_pattern ([4, None])"],
            id="window and windows by layer",
        ),
        pytest.param(
            {"window_pattern": [4, None, None]},
            ["num_layers (4)", "window_pattern ([4, None, None])"],
            id="uneven windows",
        ),
        pytest.param({"window_pattern": [None]}, ["window_pattern ([None])", "no window"], id="no window by layer"),
        pytest.param({"window_pattern": []}, ["window_pattern"], id="windows of no layer"),
        pytest.param({"window_pattern": [0]}, ["window_pattern"], id="window of nothing by layer"),
        pytest.param(
            {"mixers": ["attention", "rwkv4"], "window_pattern": [None, 4]},
            ["window_pattern ([None, 4])", "window 4 at place 1", "rwkv4"],
            id="window of another mixer",
        ),
        pytest.param(
            {"mixers": ["rwkv4", "attention"], "kv_layers": 3},
            ["kv_layers (3)", "number of attention layers (2)"],
            id="more owners than attention layers",
        ),
        pytest.param(
            {"mixers": ["rwkv4", "attention"], "kv_layers": [0, 1]},
            ["kv_layers ([0, 1])", "layer 1"],
            id="first owner below the first attention layer",
        ),
        pytest.param(
            {"mixers": ["rwkv4", "attention"], "kv_layers": [1, 2]}, ["[2] are not"], id="owner that is not attention"
        ),
        pytest.param({"feed_forward": "mlp"}, ["feed_forward ('mlp')", "not known"], id="no such feed-forward layer"),
        pytest.param(
            {"feed_forward": "rwkv_channel_mix", "moe_every": 1},
            ["feed_forward ('rwkv_channel_mix') has no effect"],
            id="no dense layer",
        ),
    ],
)
def test_model_settings_that_contradict_or_have_no_effect(values, words):
    with pytest.raises(ValidationError) as error:
        ModelConfig(**values)
    for word in words:
        assert word in str(error.value)


def test_derived_widths():
    config = ModelConfig(hidden_size=96, num_heads=6, intermediate_size=40)
    assert (config.attention_head_dim, config.attention_kv_heads, config.expert_intermediate_size) == (16, 6, 40)
    config = ModelConfig(hidden_size=100, num_heads=6, head_dim=8, num_kv_heads=2, moe=MoEConfig(intermediate_size=7))
    assert (config.attention_head_dim, config.attention_kv_heads, config.expert_intermediate_size) == (8, 2, 7)


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({"moe_every": 1}, (0, 1, 2, 3, 4)),
        ({"moe_every": 2}, (1, 3)),
        ({"moe_every": 3}, (2,)),
        ({"moe_every": 0}, ()),
        ({"moe_layers": [0, 4]}, (0, 4)),
        ({"moe_layers": []}, ()),
    ],
)
def test_moe_layers(values, layers):
    assert ModelConfig(num_layers=5, **values).moe_layer_indices == layers


@pytest.mark.parametrize(
    ("num_layers", "kv_layers", "owners"),
    [
        (12, 4, (0, 3, 6, 9)),
        (12, 1, (0,)),
        (12, 6, (0, 2, 4, 6, 8, 10)),
        (5, 2, (0, 2)),
        (5, 3, (0, 1, 3)),
        (5, None, (0, 1, 2, 3, 4)),
        (5, (0, 1, 4), (0, 1, 4)),
    ],
)
def test_owners_of_keys_and_values(num_layers, kv_layers, owners):
    assert ModelConfig(num_layers=num_layers, kv_layers=kv_layers).kv_owner_layers == owners


@given(num_layers=st.integers(1, 40), data=st.data())
def test_owners_follow_the_specification(num_layers, data):
    count = data.draw(st.integers(1, num_layers))
    owners = ModelConfig(num_layers=num_layers, kv_layers=count).kv_owner_layers
    assert owners == (0, *(int((i + 1) * num_layers / count) for i in range(count - 1)))
    assert len(set(owners)) == count
    assert list(owners) == sorted(owners)
    if count == num_layers:
        assert owners == ModelConfig(num_layers=num_layers).kv_owner_layers


def test_patterns_of_mixers_and_their_owners_of_keys():
    config = ModelConfig(mixers=("ttt_linear", "attention", "attention"), num_layers=6, kv_layers=2)
    assert config.layer_mixers == ("ttt_linear", "attention", "attention") * 2
    assert config.attention_layers == (1, 2, 4, 5) and config.kv_owner_layers == (1, 4)
    assert ModelConfig(mixers=("rwkv4", "attention"), kv_layers=(1,)).kv_owner_layers == (1,)
    assert ModelConfig(mixer="rwkv4") == ModelConfig(mixers=("rwkv4",))
    assert ModelConfig(mixers=("rwkv4", "attention", "rwkv7", "infini")).layer_mixers[3] == "infini"


@pytest.mark.parametrize(
    ("values", "reads", "words"),
    [
        pytest.param({"sliding_window": 9}, {"num_heads"}, ["sliding_window (9)", "rwkv4"], id="window of nothing"),
        pytest.param({"qk_norm": "head"}, {"num_heads"}, ["qk_norm (head)", "rwkv4"], id="norms of nothing"),
        pytest.param({"num_heads": 2}, set(), ["num_heads (2)", "no mixer reads it"], id="heads of nothing"),
        pytest.param({"hidden_size": 100}, {"num_heads"}, ["hidden_size (100)", "num_heads (8)"], id="heads"),
        pytest.param({"hidden_size": 24}, {"num_heads", "rope_theta"}, ["head_dim (3)", "even"], id="odd head"),
        pytest.param({"num_kv_heads": 3}, {"num_kv_heads"}, ["num_heads (8)", "num_kv_heads (3)"], id="groups"),
    ],
)
def test_fields_of_mixers_are_checked_by_what_the_mixers_read(values, reads, words):
    config = ModelConfig(mixer="rwkv4", **values)
    with pytest.raises(ValueError) as error:
        config.check_mixer_fields(frozenset(reads))
    for word in words:
        assert word in str(error.value)


def test_heads_that_no_mixer_reads_need_not_divide():
    ModelConfig(mixer="rwkv4", hidden_size=100).check_mixer_fields(frozenset())
    ModelConfig(mixer="rwkv4", hidden_size=24).check_mixer_fields(frozenset({"num_heads"}))  # heads of 3: no rotation
    ModelConfig(mixer="rwkv4", num_kv_heads=None, rope_theta=10000.0).check_mixer_fields(frozenset())
    ModelConfig(**dict.fromkeys(("sliding_window", "num_kv_heads"), 2)).check_mixer_fields(MIXER_FIELDS)
