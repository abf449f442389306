"""The short way of gradients against DeepSpeed's own: the same norms, weights, and sums of a skipped step."""

import math
import os
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moe_train.config.load import validate_config
from moe_train.train.batches import BatchPlan, make_tokens
from moe_train.train.engine.build import make_engine
from tests.ranks import RankPool
from tests.resolved import resolve_for
from tests.train.engine.long_way import long_way

LENGTH, VOCABULARY = 16, 64
MODEL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": VOCABULARY,
    "moe_every": 2,
    "moe": {"num_experts": 4, "top_k": 2, "intermediate_size": 24},
}
# Of fp32, the order of a sum; of 16 bits, a gradient's rounding before or after its division by the ranks.
TOLERANCE = {"fp32": 1e-6, "bf16": 5e-3, "fp16": 1e-3}


def train(world_size: int, rank: int, parallel: dict[str, Any], precision: str, accumulation: int, bad: bool) -> Any:
    """Take three steps, the last of which is skipped; norms, weights after the second, sums of the third, scales."""
    batch = 2 * world_size * accumulation
    sections = {
        "model": MODEL,
        "parallel": {"timeout_seconds": 60, **parallel},
        "optim": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0.5},
        "train": {"run_dir": "r", "precision": precision, "micro_batch_size": 2, "global_batch_size": batch},
    }
    # fp16 is for CUDA alone; here its engine runs on a CPU.
    config = resolve_for(validate_config(sections), world_size, device="cuda" if precision == "fp16" else "cpu")
    with patch.dict(os.environ, LOCAL_RANK=str(rank)):  # DeepSpeed asks a launcher's variable
        engine = make_engine(config, torch.device("cpu"))
    plan = BatchPlan(2, batch, rank, world_size)
    generator, norms, scales, weights = torch.Generator().manual_seed(0), [], [], {}
    for step in range(3):
        ids = torch.randint(VOCABULARY, (batch, LENGTH + 1), generator=generator).numpy()
        parts = []
        for micro_step in range(plan.num_micro_steps):
            own = plan.indices(0, micro_step)
            tokens = make_tokens(ids[own, :-1], own, step, None, torch.device("cpu"))
            parts.append((tokens, torch.from_numpy(ids[own, 1:].copy())))
        if bad and step == 0 and rank == world_size - 1:
            with torch.no_grad():
                next(engine.model.parameters()).view(-1)[:] = math.nan
        result = engine.train_step(parts, plan.step_size(LENGTH), 1e-3, (lambda _: True) if step == 2 else None)
        norms.append(float(result.grad_norm))
        scales.append((result.loss_scale, result.skipped))
        if step == 1:
            weights = {(each.tensor.name, each.start): each.states["weight"].clone() for each in engine.fragments()}
    sums = engine.tensor_sums()
    engine.close()
    return norms, weights, sums, scales


def compare(rank: int, world_size: int, parallel: dict[str, Any], precision: str, accumulation: int) -> None:
    ours = train(world_size, rank, parallel, precision, accumulation, False)
    with long_way():
        theirs = train(world_size, rank, parallel, precision, accumulation, False)
    close = TOLERANCE[precision]
    assert ours[0] == pytest.approx(theirs[0], rel=close) and min(ours[0]) > 0.5  # all are clipped
    assert math.isfinite(ours[0][1])  # fp16 may have overflowed before
    assert ours[3] == theirs[3]
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, weight in ours[1].items():
        # Adam divides by the size of a gradient: one near zero may turn, which moves its weight by two rates per step.
        assert (weight - theirs[1][name]).norm() <= 4e-3 * close**0.5 * weight.numel() ** 0.5, name
    assert ours[2].keys() == theirs[2].keys()
    for name, found in ours[2].items():
        torch.testing.assert_close(found, theirs[2][name], rtol=10 * close, atol=1e-12, msg=lambda m, n=name: n + m)
    assert sum(float(found[2]) for found in ours[2].values()) > 0


SPREAD, ALIKE = {"expert_parallel_size": 2}, {"expert_parallel_size": 1}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    ("experts", "stage", "accumulation"),
    [(SPREAD, 1, 1), (SPREAD, 1, 2), (SPREAD, 2, 1), (SPREAD, 2, 2), (ALIKE, 1, 1), (ALIKE, 2, 2)],
    ids=str,
)
def test_the_numbers_are_deepspeeds(
    pool2: RankPool, precision: str, experts: dict[str, int], stage: int, accumulation: int
) -> None:
    pool2.run(compare, {**experts, "zero_stage": stage}, precision, accumulation, timeout=120)


def spoil(rank: int, world_size: int, precision: str) -> tuple[list[float], list[tuple[float, bool]]]:
    norms, _, _, scales = train(world_size, rank, {**SPREAD, "zero_stage": 1}, precision, 1, True)
    return norms, scales


@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_gradient_of_one_rank_that_is_not_finite_skips_the_step_on_all(pool2: RankPool, precision: str) -> None:
    for norms, scales in pool2.run(spoil, precision, timeout=120):
        assert norms[0] == math.inf and scales[0][1]
