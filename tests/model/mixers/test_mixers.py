"""The common checks on every mixer of the registry and one from outside, alone and in patterns; slow loops; rules."""

import math
import sys

import pytest
import torch

from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.parts import load_kinds
from moe_train.config.registry import _outside, load_part
from moe_train.model.build import feed_forward_of, mixer_of
from moe_train.model.mixers.base import MixerContext
from moe_train.model.parameters import optim_rules
from moe_train.ops import rwkv7, wkv
from tests import parts
from tests.model.mixers import checks, slow
from tests.model.small import random_ids, small_config, small_model, tokens_of

LENGTH = 13  # two periods of the grids below, and a half
LONG = 75  # two chunks of RWKV's ops and more, also of what comes behind a state of a third of it
MIXERS = {
    "infini, linear": {"mixer": "infini", "infini": {"segment_length": 5}},
    "infini, delta": {"mixer": "infini", "infini": {"segment_length": 5, "memory": "delta"}},
    "rwkv4": {"mixer": "rwkv4", "feed_forward": "rwkv_channel_mix"},
    "rwkv7": {
        "mixer": "rwkv7",
        "feed_forward": "rwkv7_channel_mix",
        "rwkv7": {"decay_rank": 3, "rate_rank": 2, "value_rank": 3, "gate_rank": 5},
    },
    "ttt_linear": {"mixer": "ttt_linear", "ttt_linear": {"mini_batch": 5}},
    "ttt_linear, gate and convolutions": {
        "mixer": "ttt_linear",
        "ttt_linear": {"mini_batch": 2, "gate": True, "short_conv": True},
    },
    "ttt_mlp": {"mixer": "ttt_mlp", "ttt_mlp": {"mini_batch": 5, "inner_learning_rate": 1.0}},
}
HYBRIDS = {
    "attention and rwkv7, MLKV": {"mixers": ["attention", "rwkv7"], "kv_layers": 1},
    "ttt_mlp and attention": {"mixers": ["ttt_mlp", "attention"], "ttt_mlp": {"mini_batch": 4}},
    "infini and attention": {"mixers": ["infini", "attention"], "infini": {"segment_length": 4}},
}
OTHERS = {
    "decay": {"mixer": "decay"},
    "decay and attention": {"mixers": ["decay", "attention"]},
    "attention and decay, MLKV": {"mixers": ["attention", "decay", "attention", "attention"], "kv_layers": 2},
    "attention": {"num_kv_heads": 2, "kv_layers": 2},
    "attention, window": {"num_kv_heads": 1, "sliding_window": 4},
    "attention, windows by layer": {"window_pattern": [4, None]},
    "attention, readers see less, then more": {"window_pattern": [5, 2, 2, 6], "kv_layers": 2},
}
SLOW = {"infini": slow.infini, "rwkv4": slow.rwkv4, "rwkv7": slow.rwkv7, "ttt_linear": slow.ttt, "ttt_mlp": slow.ttt}
mixers = pytest.mark.parametrize("changes", MIXERS.values(), ids=MIXERS)
PATTERNS = MIXERS | HYBRIDS | OTHERS
patterns = pytest.mark.parametrize("changes", PATTERNS.values(), ids=PATTERNS)
FIRST = MIXERS | {name: OTHERS[name] for name in ("decay", "attention")}


@pytest.fixture(autouse=True)
def parts_from_outside(monkeypatch):
    """The parts of tests/parts are found as those of an installed package are."""
    monkeypatch.setattr(sys, "path", [str(parts.FOLDER), *sys.path])
    _outside.cache_clear()
    yield
    _outside.cache_clear()
    load_part.cache_clear()


@patterns
@pytest.mark.parametrize(
    "check",
    [checks.check_causality, checks.check_streaming, checks.check_going_back, checks.check_recomputation],
)
def test_common_checks(check, changes):
    check(changes, LENGTH)


@patterns
def test_packed_documents_are_as_alone(changes):
    checks.check_packing(changes, LENGTH)


@pytest.mark.parametrize("name", ["rwkv4", "rwkv7"])
@pytest.mark.parametrize("check", [checks.check_causality, checks.check_streaming, checks.check_going_back])
def test_common_checks_over_several_chunks(check, name):
    assert LONG - LONG // 3 > {"rwkv4": wkv, "rwkv7": rwkv7}[name].CHUNK
    check(MIXERS[name] | {"num_layers": 2}, LONG)


@pytest.mark.parametrize("changes", FIRST.values(), ids=FIRST)
def test_gradients_are_those_of_finite_differences(changes):
    checks.check_gradients(changes, LENGTH)


@mixers
def test_outputs_and_gradients_are_those_of_the_slow_loop(changes):
    model = checks.make(changes)
    compare(model, model.blocks[0].mixer, SLOW[changes["mixer"]])


@pytest.mark.parametrize(
    ("name", "reference"), [("rwkv_channel_mix", slow.channel_mix), ("rwkv7_channel_mix", slow.channel_mix7)]
)
def test_channel_mixes_are_those_of_the_slow_formula(name, reference):
    model = checks.make({"feed_forward": name})
    compare(model, model.blocks[0].feed_forward, reference)


def compare(model, layer, reference):
    """Outputs and gradients of a layer, on rows of several documents, against a reference of one document."""
    documents = checks.packed_documents(LENGTH)
    context = MixerContext(0, model._token_index(checks.index_of(random_ids(2, LENGTH), documents)))
    generator = torch.Generator().manual_seed(5)
    x, upstream = (torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=generator) for _ in range(2))

    def run(forward):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = forward(inputs)
        (y * upstream).sum().backward()
        return y.detach(), {"x": inputs.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}

    found, grads = run(lambda inputs: layer(inputs, context)[0])
    expected, expected_grads = run(
        lambda inputs: slow.by_document(lambda part: reference(layer, part), inputs, documents)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-11, atol=1e-11, msg=name)


@patterns
def test_state_bytes_are_those_that_the_kinds_say(changes):
    config = small_config(**changes)
    model = checks.make(changes)
    for length in (3, LENGTH, 5 * LENGTH):
        layers, element = range(config.num_layers), 8  # fp64
        mixed = sum(kind.state_bytes(spec, length, element) for kind, spec in (mixer_of(config, i) for i in layers))
        dense = (feed_forward_of(config, i) for i in layers if i not in config.moe_layer_indices)
        assert model.new_cache(2, length).nbytes == 2 * (mixed + sum(k.state_bytes(spec, element) for k, spec in dense))


@mixers
def test_states_and_inner_arithmetic_are_fp32_in_bf16(changes):
    """Streaming token by token is as close to the full forward as its outputs' own rounding."""
    model = small_model(small_config(**changes, init_std=0.2), dtype=torch.bfloat16).eval()
    ids, cache = random_ids(2, LENGTH), model.new_cache(2, LENGTH)
    with torch.no_grad():
        full = model(tokens_of(ids)).logits_BSV.float()
        parts = [model(checks.part_of(tokens_of(ids), i, i + 1), cache).logits_BSV for i in range(LENGTH)]
    difference = (torch.cat(parts, dim=1).float() - full).abs().max()
    assert full.isfinite().all() and difference <= 0.1 * full.abs().max()
    states = [state for layer in range(4) for state in cache.layer(layer).all]
    parts = [part for state in states for part in getattr(state, "states", {"": state}).values()]
    kinds = {name: tensor.dtype for part in parts if hasattr(part, "tensors") for name, tensor in part.tensors.items()}
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} <= {"keys", "values"}
    assert torch.float32 in kinds.values()


TTT = {"row_delta", "lr_bias", "inner_norm_weight", "inner_norm_bias", "b1", "b2", "conv_q_bias", "conv_k_bias"}
TTT |= {"post_norm.weight", "post_norm.bias"}
RWKV7 = {f"x_{letter}" for letter in "rwkvag"} | {f"{letter}{number}" for letter in "wavg" for number in (0, 1, 2)}
RWKV7 |= {"k_k", "k_a", "r_k", "ln_weight", "ln_bias"}
RWKV4 = {"mix_k", "mix_v", "mix_r", "decay", "first"}
NO_DECAY = {"infini": {"beta"}, "rwkv4": RWKV4, "rwkv7": RWKV7, "ttt_linear": TTT, "ttt_mlp": TTT}
# Factors of the learning rate; 1 of all other parameters.
FACTORS = {"infini": {"beta": 33.0}, "rwkv4": {"decay": 2.0, "first": 3.0}, "rwkv7": {"w0": 2.0}}


@mixers
def test_rules_of_the_optimizer(changes):
    """Biases, norms and gates do not decay; some parameters have a learning rate of their own."""
    rules = optim_rules(checks.make(changes).blocks[1].mixer)  # RWKV-7's first layer has less
    free = {name for name, rule in rules.items() if not rule.weight_decay}
    assert free == NO_DECAY[changes["mixer"]] & set(rules)
    factors = {name: rule.lr_factor for name, rule in rules.items() if rule.lr_factor != 1.0}
    assert factors == FACTORS.get(changes["mixer"], {})


def test_the_factor_of_the_gate_is_a_setting():
    section = {"segment_length": 5, "gate_lr_factor": 7.0}
    rules = optim_rules(checks.make({"mixer": "infini", "infini": section}).blocks[0].mixer)
    assert rules["beta"].lr_factor == 7.0


@pytest.mark.parametrize("name", ["rwkv_channel_mix", "rwkv7_channel_mix"])
def test_the_mixes_of_channel_mixes_do_not_decay(name):
    rules = optim_rules(checks.make({"feed_forward": name}).blocks[0].feed_forward)
    free = {"rwkv_channel_mix": {"mix_k", "mix_r"}, "rwkv7_channel_mix": {"x_k"}}[name]
    assert {name for name, rule in rules.items() if not rule.weight_decay} == free
    assert {rule.lr_factor for rule in rules.values()} == {1.0}


@pytest.mark.parametrize(("layer", "up", "down"), [(1, 1 / 3, 3 / 4), (3, 1.0, 1 / 4)])
def test_start_values_of_rwkv4_are_those_of_its_authors(layer, up, down):
    """Of layers l of L = 4, with up = l / (L - 1) and down = 1 - l / L; channel i of 16."""
    of_rwkv4 = {"mixer": "rwkv4", "feed_forward": "rwkv_channel_mix", "moe_layers": [0]}
    block = small_model(small_config(**of_rwkv4)).blocks[layer]
    falling = [(i / 16) ** down for i in range(16)]
    expected = {
        "mix_k": falling,
        "mix_v": [each + 0.3 * up for each in falling],
        "mix_r": [(i / 16) ** (0.5 * down) for i in range(16)],
        "decay": [-5 + 8 * (i / 15) ** (0.7 + 1.3 * up) for i in range(16)],
        "first": [math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(16)],
    }
    named = [(block.mixer, expected), (block.feed_forward, dict.fromkeys(("mix_k", "mix_r"), falling))]
    of_rwkv7 = small_model(small_config(feed_forward="rwkv7_channel_mix", moe_layers=[0])).blocks[layer].feed_forward
    named.append((of_rwkv7, {"x_k": [1 - (i / 16) ** down**4 for i in range(16)]}))
    for module, values in named:
        vectors = {name: parameter for name, parameter in module.named_parameters() if parameter.dim() == 1}
        assert vectors.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(
                vectors[name].detach(), torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-14, msg=name
            )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.mixer=infini"], ["train.sequence_length (64)", "model.infini.segment_length (128)"]),
        (["--model.mixer=infini", "--model.infini.segment_length=64"], ["segment_length (64)"]),
        (["--model.mixer=infini", "--model.infini.memory=sum"], ["model.infini.memory", "sum", "delta"]),
        (["--model.mixer=ttt_linear", "--model.ttt_linear.mini_batch=0"], ["model.ttt_linear.mini_batch", "0"]),
        (["--model.mixer=ttt_mlp", "--model.head_dim=4"], ["model.head_dim (4)", "num_heads (8)", "ttt_mlp"]),
        (["--model.mixer=rwkv7", "--model.head_dim=4"], ["model.head_dim (4)", "hidden_size (64)", "rwkv7"]),
        (["--model.mixer=rwkv7", "--model.rwkv7.gate_rank=0"], ["model.rwkv7.gate_rank", "0"]),
        (["--model.mixer=rwkv4", "--model.rwkv4.rank=1"], ["model.rwkv4", "has no settings"]),
        (["--model.mixer=rwkv4", "--model.infini.memory=delta"], ["infini", "no effect"]),
        (
            ["--model.mixer=ttt_linear", "--model.num_kv_heads=2"],
            ["model: num_kv_heads (2) has no effect", "ttt_linear"],
        ),
        (["--model.mixer=ttt_mlp", "--model.hidden_size=24"], ["head_dim (3) must be even"]),
        (["--model.mixer=ttt_mlp", "--model.hidden_size=100"], ["hidden_size (100)", "num_heads (8)"]),
        (["--model.mixer=rwkv7", "--model.rope_theta=5"], ["model: rope_theta (5.0) has no effect", "rwkv7"]),
        (["--model.mixer=rwkv4", "--model.rope_theta=5"], ["model: rope_theta (5.0) has no effect", "rwkv4"]),
        (["--model.mixer=rwkv4", "--model.head_dim=8"], ["model: head_dim (8) has no effect", "rwkv4"]),
        (["--model.mixer=rwkv4", "--model.num_heads=2"], ["model: num_heads (2) has no effect", "rwkv4"]),
        (["--model.mixer=rwkv4", "--model.qk_norm=head"], ["model: qk_norm (head) has no effect", "rwkv4"]),
        (["--model.mixer=infini", "--model.sliding_window=9"], ["model: sliding_window (9) has no effect", "infini"]),
        (["--model.mixer=infini", "--model.num_kv_heads=3"], ["num_heads (8)", "num_kv_heads (3)"]),
        (["--model.mixers=rwkv4,ttt_mlp", "--model.num_kv_heads=2"], ["num_kv_heads (2) has no effect", "ttt_mlp"]),
    ],
)
def test_settings_that_cannot_work_are_named(options, words):
    sizes = ["--model.hidden_size=64", "--train.sequence_length=64", "--train.run_dir=unused"]
    with pytest.raises(UsageError) as error:
        config = load_config([*sizes, *options], program="t")
        load_kinds(config).check(config)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        ["--model.mixer=rwkv4", "--model.hidden_size=100"],  # there are no heads that could divide it
        ["--model.mixers=rwkv4,attention", "--model.num_heads=4", "--model.num_kv_heads=2", "--model.rope_theta=5"],
        ["--model.mixer=rwkv7", "--model.num_heads=4", "--model.head_dim=64"],
        ["--model.mixer=decay", "--model.num_kv_heads=2", "--model.sliding_window=9"],  # one from outside reads all
    ],
)
def test_fields_that_a_mixer_of_the_pattern_reads_may_be_given(options):
    config = load_config([*options, "--train.run_dir=unused"], program="t")
    load_kinds(config).check(config)


@pytest.mark.parametrize(
    ("name", "section", "expected"),
    [
        ("ttt_linear", {"mini_batch": 16}, 4 * (6 * 8**2 + 4 * 16 * 8)),
        ("ttt_mlp", {"mini_batch": 16}, 4 * (56 * 8**2 + 20 * 16 * 8)),
        ("rwkv4", None, 30 * 32),
        # 4 query heads of 8 on 2 heads of keys: local attention, a read, and a write that the delta rule doubles.
        ("infini", {"segment_length": 10}, 2 * 4 * 8 * 11 + 2 * 4 * 8**2 + 2 * 2 * 8**2),
        ("infini", {"segment_length": 10, "memory": "delta"}, 2 * 4 * 8 * 11 + 2 * 4 * 8**2 + 4 * 2 * 8**2),
    ],
)
def test_operations_beside_the_projections(name, section, expected):
    own = {} if section is None else {name: section}
    kind, spec = mixer_of(small_config(hidden_size=32, mixer=name, **own), 0)
    assert kind.flops(spec, 64) == expected
