"""Parameter counts, without allocating; those of published models are in test_published."""

import pytest
import torch

from moe_train.model.count import count_parameters
from tests.model.small import VOCAB, small_config, small_model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"moe_every": 0, "moe": {}},
        {"moe_layers": [0, 3], "moe": {"num_experts": 4, "top_k": 3, "intermediate_size": 5}},
        {"kv_layers": 2, "norm": "layernorm", "norm_position": "post"},
        {"kv_layers": 2, "qk_norm": "head"},
        {"num_kv_heads": 1, "qk_norm": "projection"},
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
