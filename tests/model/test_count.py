"""Parameter counts, without allocating."""

from pathlib import Path

import pytest
import torch

from moe_train.config.load import load_config
from moe_train.config.model import ModelConfig, MoEConfig
from moe_train.model.build import build_model
from moe_train.model.count import count_parameters
from tests.model.small import VOCAB, small_config, small_model

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "mixtral_8x7b.yaml"


def mixtral() -> ModelConfig:
    if CONFIG.exists():
        return load_config([f"--config={CONFIG}"], program="test").model
    return ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14336,
        moe_every=1,
        moe=MoEConfig(num_experts=8, top_k=2, router="softmax_topk", load_cv2_coef=0.0),
    )


def test_mixtral_8x7b():
    config = mixtral()
    count = count_parameters(config, config.vocab_size)
    assert count.total == 46_702_792_704
    assert count.active == 12_879_925_248
    assert count.experts == 32 * 8 * 3 * 4096 * 14336
    assert all(parameter.is_meta for parameter in build_model(config, 32000).parameters())


def test_deepseek_moe_16b():
    """The size that its authors published; shared experts are passed by every token."""
    path = CONFIG.with_name("deepseek_moe_16b.yaml")
    config = load_config([f"--config={path}"], program="test").model
    count = count_parameters(config, config.vocab_size)
    assert count.total == 16_375_728_128
    expert = 3 * 2048 * 1408
    assert count.experts == 27 * 64 * expert
    assert count.active == count.total - 27 * (64 - 6) * expert


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"moe_every": 0, "moe": {}},
        {"moe_layers": [0, 3], "moe": {"num_experts": 4, "top_k": 3, "intermediate_size": 5}},
        {"kv_layers": 2, "norm": "layernorm", "norm_position": "post"},
        {
            "moe": {
                "num_experts": 4,
                "num_shared_experts": 2,
                "router": "sigmoid_topk",
                "load_cv2_coef": 0,
                "bias_update_rate": 0.1,
            }
        },
    ],
)
def test_counts_are_those_of_the_real_model(changes):
    config = small_config(**changes)
    model = small_model(config, dtype=torch.float32)
    count = count_parameters(config, VOCAB)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    experts = {n: p for n, p in model.named_parameters() if ".experts." in n}
    assert count.experts == sum(p.numel() for p in experts.values())
    chosen = sum(p[: config.moe.top_k].numel() for p in experts.values())
    assert count.active == count.total - count.experts + chosen
