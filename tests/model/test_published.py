"""The configurations of published models: their sizes and options, tensor by tensor, and what they compute."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.config.load import load_config
from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model
from moe_train.model.count import count_parameters
from moe_train.model.parameters import logical_tensors
from tests.model.small import random_ids, small_model, tokens_of
from tests.resolved import resolve_for

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WITHOUT_EXTRA = "an optional extra: pip install -c requirements/constraints.txt '.[hf]'"

# Total and active parameters. The totals are those of the released weights (in the index of the safetensors files of
# each on huggingface.co, total_size is two bytes for each, of OLMoE four); active: what a token passes of them, which
# their papers and cards round (Mixtral 13B and 39B, Qwen3 3.3B and 22B, OLMoE 1.3B, DeepSeekMoE 2.8B).
COUNTS = {
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),  # mistralai/Mixtral-8x7B-v0.1
    "mixtral_8x22b": (140_620_634_112, 39_152_031_744),  # mistral-community/Mixtral-8x22B-v0.1
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),  # Qwen/Qwen3-30B-A3B
    "qwen3_235b_a22b": (235_093_634_560, 22_190_763_520),  # Qwen/Qwen3-235B-A22B
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280),  # allenai/OLMoE-1B-7B-0924
    "deepseek_moe_16b": (16_375_728_128, 2_828_650_496),  # deepseek-ai/deepseek-moe-16b-base
    "moe_7b_a1b_mlkv": (7_082_711_552, 1_269_406_208),  # ours
}

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
# What the released config.json of each says of its architecture; hidden_size, num_hidden_layers, num_attention_heads
# and the inner width of an expert follow below.
RELEASED: dict[str, dict[str, Any]] = {
    "mixtral_8x7b": MIXTRAL,
    "mixtral_8x22b": MIXTRAL,
    "qwen3_30b_a3b": QWEN3,
    "qwen3_235b_a22b": QWEN3,
    "olmoe_1b_7b": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    },
}
SIZES = {
    "mixtral_8x7b": (4096, 32, 32, 14336),
    "mixtral_8x22b": (6144, 56, 48, 16384),
    "qwen3_30b_a3b": (2048, 48, 32, 768),
    "qwen3_235b_a22b": (4096, 94, 64, 1536),
    "olmoe_1b_7b": (2048, 16, 16, 1024),
}
QK_NORMS = {"mixtral": "none", "qwen3_moe": "head", "olmoe": "projection"}
released = pytest.mark.parametrize("name", RELEASED)


def released_values(name: str) -> dict[str, Any]:
    """As in config.json."""
    hidden_size, num_layers, num_heads, width = SIZES[name]
    width_name = "moe_intermediate_size" if RELEASED[name]["model_type"] == "qwen3_moe" else "intermediate_size"
    return RELEASED[name] | {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        width_name: width,
        "tie_word_embeddings": False,
    }


def load(name: str, *options: str) -> ModelConfig:
    return load_config([f"--config={CONFIGS / name}.yaml", *options], program="test").model


def hugging_face_model(values: dict[str, Any], **options: Any) -> Any:
    """A model of transformers with the sizes that a config.json gives."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(values)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    # Its padding token would have no gradient in the embedding.
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(**values, **tokens, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config, **options)


def hugging_face_name(name: str) -> str:
    """What transformers calls a tensor."""
    whole = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    whole["head.weight"] = "lm_head.weight"
    if name in whole:
        return whole[name]
    _, layer, part = name.split(".", 2)
    parts = {
        "mixer_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        "mixer.query_norm.weight": "self_attn.q_norm.weight",
        "mixer.key_norm.weight": "self_attn.k_norm.weight",
        "feed_forward.router.gate.weight": "mlp.gate.weight",
        "feed_forward.experts.gate_up": "mlp.experts.gate_up_proj",
        "feed_forward.experts.down": "mlp.experts.down_proj",
    }
    parts |= {
        f"mixer.{kind}.weight": f"self_attn.{kind[0]}_proj.weight" for kind in ("query", "key", "value", "output")
    }
    return f"model.layers.{layer}.{parts[part]}"


def test_every_configuration_is_counted_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*COUNTS, "quickstart"}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_published_ones_and_the_file_says_them(name: str) -> None:
    config = load(name)
    assert config.vocab_size is not None
    count = count_parameters(config, config.vocab_size)
    assert (count.total, count.active) == COUNTS[name]
    assert all(f"{number:,}" in _header(name) for number in COUNTS[name])
    assert f"launch/train.py --config configs/{name}.yaml" in _header(name)


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_divide_on_the_cluster_that_the_file_names(name: str) -> None:
    config = load_config([f"--config={CONFIGS / name}.yaml"], program="test")
    named = re.search(r"(?:(\d+) to )?(\d+) nodes of 8 GPUs", _header(name))
    assert named is not None
    for nodes in {int(number) for number in named.groups() if number is not None}:
        resolved = resolve_for(config, nodes * 8, 8)
        assert resolved.parallel.expert_parallel_size == config.parallel.expert_parallel_size
        assert resolved.train.micro_batch_size == config.train.micro_batch_size


def _header(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


@released
def test_options_are_those_of_the_released_configuration(name: str) -> None:
    config, values = load(name), released_values(name)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.expert_intermediate_size) == SIZES[name]
    assert config.vocab_size == values["vocab_size"] and not config.tie_embeddings
    assert config.attention_kv_heads == values["num_key_value_heads"]
    assert config.attention_head_dim == values.get("head_dim", config.hidden_size // config.num_heads)
    assert (config.norm, config.norm_position, config.norm_epsilon) == ("rmsnorm", "pre", values["rms_norm_eps"])
    assert config.rope_theta == values["rope_theta"] and config.qk_norm == QK_NORMS[values["model_type"]]
    assert config.kv_owner_layers == config.moe_layer_indices == tuple(range(config.num_layers))
    moe = config.moe
    num_experts = values.get("num_experts", values.get("num_local_experts"))
    assert (moe.num_experts, moe.top_k) == (num_experts, values["num_experts_per_tok"])
    assert moe.router == "softmax_topk" and moe.gates_sum_to_one == values.get("norm_topk_prob", True)
    assert moe.num_shared_experts == 0 and moe.capacity_factor is None


@released
def test_tensors_are_those_of_transformers(name: str) -> None:
    pytest.importorskip("transformers", reason=WITHOUT_EXTRA)
    with torch.device("meta"):
        theirs = {
            key: tuple(value.shape) for key, value in hugging_face_model(released_values(name)).named_parameters()
        }
    config = load(name)
    assert config.vocab_size is not None
    ours = logical_tensors(build_model(config, config.vocab_size))
    assert {hugging_face_name(key) for key in ours} == theirs.keys()
    for key, tensor in ours.items():
        shape = theirs[hugging_face_name(key)]
        if tensor.is_expert:  # ours are [E, in, out]
            shape = (shape[0], shape[2], shape[1])
        assert tensor.shape == shape, key
    numbers = {key: torch.Size(shape).numel() for key, shape in theirs.items()}
    experts = sum(number for key, number in numbers.items() if ".experts." in key)
    unused = experts // config.moe.num_experts * (config.moe.num_experts - config.moe.top_k)
    assert (sum(numbers.values()), sum(numbers.values()) - unused) == COUNTS[name]
    assert count_parameters(config, config.vocab_size).experts == experts


def test_deepseek_moe_16b_is_counted_by_hand() -> None:
    """There is no class of it in transformers: the shapes of its own modelling file, with its configuration's sizes."""
    vocab, hidden, layers, dense, expert, experts, shared = 102400, 2048, 28, 10944, 1408, 64, 2
    attention, norms = 4 * hidden * hidden, 2 * hidden
    moe = experts * hidden + (experts + shared) * 3 * hidden * expert
    total = 2 * vocab * hidden + hidden + layers * (attention + norms) + 3 * hidden * dense + (layers - 1) * moe
    assert (total, total - (layers - 1) * (experts - 6) * 3 * hidden * expert) == COUNTS["deepseek_moe_16b"]
    config = load("deepseek_moe_16b")
    assert config.moe_layer_indices == tuple(range(1, layers))
    assert (config.rope_theta, config.norm_epsilon, config.attention_head_dim) == (1e4, 1e-6, 128)
    assert config.attention_kv_heads == config.num_heads == 16 and not config.tie_embeddings
    tensors = logical_tensors(build_model(config, vocab))
    assert tensors["blocks.0.feed_forward.gate_up.weight"].shape == (2 * dense, hidden)
    assert tensors["blocks.1.feed_forward.shared.gate_up.weight"].shape == (2 * shared * expert, hidden)


@released
def test_a_small_copy_computes_what_transformers_computes(name: str) -> None:
    """Rotation, norms of queries and keys, choice of experts, gates and SwiGLU, on shared random weights."""
    pytest.importorskip("transformers", reason=WITHOUT_EXTRA)
    kv_heads = 4 if RELEASED[name]["model_type"] == "olmoe" else 2
    values = released_values(name) | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {"num_key_value_heads": kv_heads, "vocab_size": 23, "num_experts_per_tok": 3}
    values |= {key: 8 for key in values if key in ("num_experts", "num_local_experts")}
    values |= {key: 24 for key in values if key.endswith("intermediate_size")}
    values |= {"head_dim": 12} if "head_dim" in values else {}
    width = "model.intermediate_size" if "num_local_experts" in values else "model.moe.intermediate_size"
    sizes = {"model.hidden_size": 32, "model.num_layers": 2, "model.num_heads": 4, "model.num_kv_heads": kv_heads}
    sizes |= {"model.vocab_size": 23, "model.moe.num_experts": 8, "model.moe.top_k": 3, width: 24}
    sizes |= {"model.head_dim": 12} if "head_dim" in values else {}
    sizes |= {"model.init_std": 0.3, "parallel.expert_parallel_size": 1}
    ours = small_model(load(name, *(f"--{key}={value}" for key, value in sizes.items())), dtype=torch.float32)
    theirs = hugging_face_model(values, attn_implementation="eager", experts_implementation="eager")
    weights: dict[str, Tensor] = {}
    for key, parameter in ours.named_parameters():
        if "norm" in key:
            parameter.data += 0.3 * torch.arange(parameter.numel()).cos()
        is_expert = ".experts." in key
        weights[hugging_face_name(key)] = parameter.data.transpose(1, 2) if is_expert else parameter.data
    theirs.load_state_dict(weights, strict=True)
    ids = random_ids(2, 17)
    found, expected = ours(tokens_of(ids)).logits_BSV, theirs(input_ids=ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fp32
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found.backward(upstream)
    expected.backward(upstream)
    for key, parameter in ours.named_parameters():
        grad = theirs.get_parameter(hugging_face_name(key)).grad
        grad = grad.transpose(1, 2) if ".experts." in key else grad
        scale = grad.abs().max()
        assert scale > 1e-3 and (parameter.grad - grad).abs().max() <= 1e-4 * scale, key  # fp32
