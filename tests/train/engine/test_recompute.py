"""Recomputation under DeepSpeed: the same numbers to the last bit, whichever part of which blocks is recomputed."""

import os
from typing import Any

import pytest
import torch

from benchmarks.plan_check.memory import make_batches, size_of
from moe_train.config.load import load_config
from moe_train.config.run import RecomputedPart
from moe_train.distributed.traffic import TrafficMeter
from moe_train.model.block import Recompute
from tests.resolved import resolve_for

BASE = {
    "model.vocab_size": 64,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.intermediate_size": 48,
    "model.moe.num_experts": 4,
    "model.moe.num_shared_experts": 1,
    "model.moe.input_jitter": 0.01,
    "train.run_dir": "unused",
    "train.precision": "fp32",
    "train.sequence_length": 16,
    "train.micro_batch_size": 2,
    "optim.learning_rate": 0.01,
    "deepspeed": '{"zero_optimization": {"reduce_bucket_size": 20000}}',
}
WAYS: tuple[tuple[RecomputedPart, int], ...] = (
    ("none", 1),
    ("attention", 1),
    ("experts", 1),
    ("block", 1),
    ("experts", 2),
    ("block", 3),
)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 1": (2, {"parallel.expert_parallel_size": 2, "parallel.chunks": 2, "train.precision": "bf16"}),
    "zero 2, accumulation": (2, {"parallel.zero_stage": 2, "train.global_batch_size": 8}),
    "zero 3": (2, {"parallel.zero_stage": 3, "parallel.expert_parallel_size": 2, "parallel.dispatch": "unique"}),
    "zero 3, ring": (
        4,
        {
            "parallel.zero_stage": 3,
            "parallel.expert_parallel_size": 2,
            "parallel.context_parallel_size": 2,
            "parallel.context_exchange": "ring",
        },
    ),
    "hidden copies": (2, {"parallel.zero_stage": 3, "model.hidden_copies": '{"copies": 2, "window_positions": 2}'}),
}
ALWAYS = ("zero 3",)  # by `make test`; the others take a minute
MOE_LAYERS = (1, 3)


def train(rank: int, world_size: int, changes: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Loss, gradient norm, tokens of every expert, and bytes sent, of three steps with each way to recompute."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    from moe_train.train.engine.build import make_engine, sharing_ranks

    found = []
    for part, every in WAYS:
        values = BASE | changes | {"train.recompute": part, "train.recompute_every": every}
        config = load_config([f"--{name}={value}" for name, value in values.items()], program="test")
        resolved, device = resolve_for(config, world_size), torch.device("cpu")
        meter = TrafficMeter(device)
        engine = make_engine(resolved, device, meter)
        steps = []
        for step in range(3):
            batches = make_batches(resolved, rank, world_size, step, sharing_ranks(resolved, engine.mesh))
            with meter.counting():
                result = engine.train_step(batches, size_of(resolved), 0.01)
            assert result.sums is not None
            steps.append((result.loss.item(), float(result.grad_norm), result.sums.counts.tolist()))
        found.append((steps, meter.read().num_bytes))
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in CASES])
def test_steps_are_the_same_to_the_last_bit(name: str, request: pytest.FixtureRequest) -> None:
    ranks, changes = CASES[name]
    for found in request.getfixturevalue(f"pool{ranks}").run(train, changes, timeout=200):
        (plain, sent), *others = found
        assert len({loss for loss, *_ in plain}) == 3  # it trains
        for (part, every), (steps, sent_again) in zip(WAYS[1:], others, strict=True):
            assert steps == plain, (part, every)
            repeats = any(Recompute(part, every).repeats("experts", layer) for layer in MOE_LAYERS)
            assert sent_again > sent if repeats and sent else sent_again == sent, (part, every)
