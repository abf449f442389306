"""Training with the optimizer in the host's memory: the numbers of the same training without offload."""

import itertools
import os
from typing import Any

import pytest
import torch

from moe_train.config.load import load_config
from tests.ranks import RankPool
from tests.resolved import resolve_for
from tests.train.engine.long_way import long_way

STEPS, SKIPPED = 5, 2  # of a run, and the one whose update is left out
MODEL = {
    "model.vocab_size": 64,
    "model.hidden_size": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.intermediate_size": 32,
    "model.moe.num_experts": 4,
    "model.moe.bias_update_rate": 0.01,
    "train.run_dir": "unused",
    "train.sequence_length": 16,
    "train.micro_batch_size": 2,
    # So small that tensors are reduced in several buckets, and one is larger than a bucket.
    "deepspeed": '{"zero_optimization": {"reduce_bucket_size": 1500}}',
}
CASES = [
    (ranks, size, stage, passes, precision)
    for (ranks, size), stage, passes, precision in itertools.product(
        ((1, 1), (2, 1), (2, 2)), (1, 2, 3), (1, 2), ("fp32", "bf16")
    )
]
ALWAYS = [(2, 2, 2, 2, "bf16"), (2, 2, 1, 1, "fp32"), (2, 2, 3, 2, "bf16")]  # in all, a minute
GROWN = {"fp32": 1e-5, "bf16": 1e-2}  # what some steps make of a rounding of a norm, relative


def options(ranks: int, size: int, stage: int, passes: int, precision: str, **more: Any) -> list[str]:
    own = {
        "parallel.expert_parallel_size": size,
        "parallel.zero_stage": stage,
        "train.global_batch_size": 2 * ranks * passes,
        "train.precision": precision,
    }
    given = MODEL | own | {name.replace("__", "."): value for name, value in more.items()}
    return [f"--{name}={value}" for name, value in given.items()]


def train(rank: int, world_size: int, given: list[str]) -> dict[str, Any]:
    """Figures of every step, what a skipped step knew of its gradients, and the state at the end."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    from benchmarks.plan_check.memory import make_batches, size_of
    from moe_train.train.engine.build import make_engine

    config = resolve_for(load_config(given, program="test"), world_size)
    with long_way():  # offload has no other: what is compared differs in nothing else
        engine = make_engine(config, torch.device("cpu"))
    steps, gradients = [], {}
    for step in range(STEPS):
        batches = make_batches(config, rank, world_size, step)
        result = engine.train_step(batches, size_of(config), 1e-2, lambda _, step=step: step == SKIPPED)
        steps.append((float(result.loss), float(result.grad_norm), result.skipped))
        if result.skipped:
            gradients = {name: sums[2:].tolist() for name, sums in engine.tensor_sums().items()}
    zero: Any = engine._zero
    return {
        "steps": steps,
        "gradients": gradients,
        "optimizer_step": engine.optimizer_step,
        "states": {f"{f.tensor.name} {kind}": s.clone() for f in engine.fragments() for kind, s in f.states.items()},
        "offloads": getattr(zero, "cpu_offload", None) or getattr(zero, "offload_optimizer", None),
        "optimizer": type(zero.optimizer).__name__,
    }


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in ALWAYS else pytest.mark.slow) for c in CASES])
def test_the_numbers_are_those_without_offload(case: tuple, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue(f"pool{case[0]}")
    for bound in (0.05, 0.0):  # of every norm; and no clipping
        plain, moved = (
            pool.run(train, options(*case, optim__max_grad_norm=bound, parallel__offload_optimizer=where))
            for where in ("none", "cpu")
        )
        for here, there in zip(moved, plain, strict=True):
            assert here["offloads"] and not there["offloads"] and here["optimizer"] == "AdamW"
            assert here["optimizer_step"] == there["optimizer_step"] == STEPS - 1
            assert [skipped for *_, skipped in here["steps"]] == [step == SKIPPED for step in range(STEPS)]
            assert min(norm for _, norm, _ in there["steps"]) > 0.05 and any(map(any, there["gradients"].values()))
            # An offloaded norm is added up in another order, in part in fp32 (deepspeed 0.19.8); clipping uses it.
            compare(here, there, 0.0 if bound == 0 else GROWN[case[4]])


def compare(here: dict, there: dict, grown: float) -> None:
    """To the last bit where nothing grows, except the norms."""
    losses, norms = ([step[place] for step in here["steps"]] for place in (0, 1))
    assert losses == pytest.approx([loss for loss, *_ in there["steps"]], rel=grown, abs=0)
    assert norms == pytest.approx([step[1] for step in there["steps"]], rel=max(grown, 1e-6), abs=0)
    for name, expected in there["gradients"].items():
        assert here["gradients"][name] == pytest.approx(expected, rel=2 * grown, abs=0), name
    assert here["states"].keys() == there["states"].keys()
    for name, state in there["states"].items():
        scale = float(state.abs().max()) * grown
        torch.testing.assert_close(here["states"][name], state, rtol=0.0, atol=scale)
