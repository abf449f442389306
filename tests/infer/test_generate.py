"""Drawing tokens."""

import torch

from moe_train.config import ModelConfig, MoEConfig
from moe_train.infer.generate import choose_token, generate
from moe_train.model.build import build_model
from moe_train.model.parameters import materialize
from moe_train.model.transformer import Tokens


def test_choose_token_follows_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (1.0, 0.5):
        chosen = torch.stack([choose_token(logits, temperature, draw) for draw in draws])
        counts = torch.bincount(chosen, minlength=4).double()
        expected = (logits.double() / temperature).softmax(0)
        assert torch.allclose(counts / 20_000, expected, atol=1e-4)  # the draws are a grid: only its step errs
    assert choose_token(logits, 0.0, draws[0]) == 3


def test_greedy_generation_equals_the_full_forward_each_time() -> None:
    config = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64, kv_layers=1)
    model = build_model(config.model_copy(update={"moe": MoEConfig(num_experts=4)}), 50)
    materialize(model, seed=3, dtype=torch.float64, device=torch.device("cpu"))
    prompt = [1, 2, 3]
    new = generate(model, prompt, 6, temperature=0.0, seed=0, vocab_size=50)
    model.eval()
    text = list(prompt)
    for token in new:
        logits = model(Tokens(torch.tensor([text]), torch.zeros(1, dtype=torch.int64))).logits_BSV
        assert int(logits[0, -1].argmax()) == token
        text.append(token)


def test_padding_rows_are_never_drawn() -> None:
    model = build_model(ModelConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, moe_every=0), 64)
    materialize(model, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    assert max(generate(model, [0], 40, temperature=5.0, seed=1, vocab_size=8)) < 8
