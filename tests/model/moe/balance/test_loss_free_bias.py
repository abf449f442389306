"""The bias that balances without a loss: its rule, its effect, and that it is counted once over ranks."""

import functools
from dataclasses import replace

import pytest
import torch

from moe_train.distributed.collectives import world_group
from moe_train.distributed.mesh import create_mesh
from moe_train.model.build import ExpertPlacement
from moe_train.model.moe.balance.base import Scheduled
from moe_train.model.moe.balance.loss_free_bias import LossFreeBias
from moe_train.model.moe.routers.base import RouterOptions
from moe_train.model.moe.routers.sigmoid_topk import SigmoidTopKRouter
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.objective import TrainingObjective
from moe_train.model.step_size import StepSize
from moe_train.ops.keyed_random import combine, make_key
from moe_train.train.telemetry.load_metrics import max_violation
from tests.model.small import random_ids, small_config, small_model, tokens_of

BATCH, LENGTH = 4, 6


def test_the_rule():
    """b += u sign(mean(c) - c)."""
    counts = torch.tensor([[4, 0, 2, 2], [3, 3, 3, 3], [1, 1, 1, 2]])
    bias = torch.tensor([[0.5, 0, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]])
    moved = LossFreeBias(0.25).after_step(bias, counts, 1.0)
    assert moved.tolist() == [[0.25, 0.25, 0, 0], [1, 2, 3, 4], [0.25, 0.25, 0.25, -0.25]]
    assert LossFreeBias(0.25).after_step(bias, counts, 0.5)[2].tolist() == [0.125, 0.125, 0.125, -0.125]


def test_an_unbalanced_router_becomes_even():
    router = SigmoidTopKRouter(8, 16, 2, True, 1.0, options=RouterOptions(has_selection_bias=True))
    generator = torch.Generator().manual_seed(0)
    router.gate.weight.data = torch.randn(16, 8, generator=generator)
    router.gate.weight.data[3, 0] += 4
    x = torch.randn(8192, 8, generator=generator)
    x[:, 0] = 1  # expert 3 is everybody's favourite
    keys = combine(make_key("t"), torch.arange(len(x)))
    rule, violations = Scheduled(LossFreeBias(0.01), ((200, 1.0), (300, 0.05))), []
    for step in range(300):
        counts = router(x, keys).sums.counts
        violations.append(max_violation(counts.double()).item())
        moved = rule.rule.after_step(router.selection_bias[None], counts[None], rule.factor(step))
        router.selection_bias = moved[0]
    assert violations[0] > 2
    assert violations[-1] < 0.1


MOE = {"num_experts": 4, "top_k": 2, "router": "sigmoid_topk", "load_cv2_coef": 0, "bias_update_rate": 0.125}


def bias_after_a_step(rank, world_size, recompute, num_micro_steps):
    """The biases after a step in which this rank had its part of the batch, in some micro-steps."""
    placement = None
    if world_size > 1:
        mesh = create_mesh(world_size, timeout_seconds=60)
        placement = ExpertPlacement(mesh.expert.rank, world_size, mesh.dispatch_groups)
    model = small_model(small_config(moe_every=2, moe=MOE), placement=placement, recompute=recompute)
    rule = Scheduled(LossFreeBias(0.125), ((0, 1.0), (2, 3.0)))
    objective = TrainingObjective(model, (), world_group(), rule)
    ids, found = random_ids(BATCH, LENGTH), []
    step_size = StepSize(world_size * num_micro_steps, BATCH * LENGTH, BATCH * LENGTH)
    for micro_step in range(num_micro_steps):
        size = BATCH // world_size // num_micro_steps
        start = (micro_step * world_size + rank) * size
        here = torch.arange(start, start + size)
        losses = objective(replace(tokens_of(ids[here], step=1), sequences_B=here), ids[here], step_size)
        losses.total.backward()
        found.append(losses.sums)
    total = functools.reduce(RoutingSums.plus, found)
    objective.after_step(total, 1, step_size, skipped=False)
    return total.counts, torch.stack([router.selection_bias for router in model.routers])


@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
def test_ranks_accumulation_and_recomputation_move_it_alike(recompute, pool2, pool4):
    counts, bias = bias_after_a_step(0, 1, "none", 1)
    expected = 0.25 * (counts.double().mean(1, keepdim=True) - counts).sign()  # the factor of step 1 is 2
    assert torch.equal(bias, expected.float()) and bias.any()
    results = [*pool2.run(bias_after_a_step, recompute, 1), *pool2.run(bias_after_a_step, recompute, 2)]
    results += [*pool4.run(bias_after_a_step, recompute, 1), bias_after_a_step(0, 1, recompute, 4)]
    for _, moved in results:
        assert torch.equal(moved, bias)
