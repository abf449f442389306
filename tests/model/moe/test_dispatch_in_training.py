"""Every dispatch in a whole model: with recomputation, losses over all ranks, and unequal numbers of tokens."""

import pytest
import torch

from moe_train.config.run import RecomputedPart
from moe_train.distributed.collectives import world_group
from moe_train.distributed.mesh import create_mesh
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.moe.balance.base import Scheduled
from moe_train.model.moe.balance.cv_squared import SquaredVariation
from moe_train.model.moe.dispatch.flat import FlatDispatcher
from moe_train.model.moe.dispatch.two_level import TwoLevelDispatcher
from moe_train.model.moe.dispatch.unique import UniqueDispatcher
from moe_train.model.objective import TrainingObjective
from moe_train.model.step_size import StepSize
from moe_train.ops.payload import Payload
from tests.model.small import random_ids, small_config, small_model, tokens_of

CONFIG = small_config(moe_every=1, moe={"num_experts": 8, "top_k": 3, "num_shared_experts": 1})
WAYS: tuple[tuple[str, int, RecomputedPart], ...] = (
    ("flat", 1, "none"),
    ("two_level", 3, "block"),
    ("unique", 5, "experts"),
    ("two_level", 1, "none"),
)


def gradients(rank: int, dispatch: str, num_chunks: int, recompute: RecomputedPart) -> list[torch.Tensor]:
    """Of two micro-batches; then an evaluation without gradients, in which all ranks have to meet too."""
    mesh = create_mesh(4, 60, node_size=2 if dispatch == "two_level" else None)
    placement = ExpertPlacement(mesh.expert.rank, 4, mesh.dispatch_groups, dispatch, num_chunks)
    model = small_model(CONFIG, placement=placement, recompute=recompute).train()
    terms = (
        Scheduled(SquaredVariation(0.3, "importance", "micro_step")),
        Scheduled(SquaredVariation(0.2, "load", "micro_step")),
    )
    objective = TrainingObjective(model, terms, world_group())
    for micro in range(2):
        sequences = 1 + (rank + micro) % 3
        ids, targets = (random_ids(sequences, 7, seed=seed) for seed in (10 * rank + micro, 77 + rank))
        objective(tokens_of(ids, step=micro), targets, StepSize.of_one_part(targets.numel())).total.backward()
    model.eval()
    with torch.no_grad():
        assert model(tokens_of(ids)) is not None
    return [parameter.grad for parameter in model.parameters()]


def run_all(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    return [gradients(rank, *way) for way in WAYS]


def test_every_way_gives_the_same_gradients(pool4):
    for expected, *others in pool4.run(run_all, timeout=120):
        for found in others:
            for ours, theirs in zip(found, expected, strict=True):
                # fp64; sums over 8 experts' rows in another order.
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11 * float(theirs.abs().max() + 1))


@pytest.mark.parametrize(
    ("dispatch", "groups", "kind"),
    [
        ("flat", ("ep",), FlatDispatcher),
        ("unique", ("ep",), UniqueDispatcher),
        ("two_level", ("across", "within"), TwoLevelDispatcher),
        ("two_level", ("ep",), UniqueDispatcher),  # the ranks that share the experts are one node's
    ],
)
def test_what_is_configured_reaches_the_dispatcher(dispatch, groups, kind):
    placement = ExpertPlacement(0, 1, groups, dispatch, num_chunks=3, payload="fp8")
    for block in build_model(CONFIG, 64, placement=placement).blocks:
        dispatcher = block.feed_forward.dispatcher
        assert type(dispatcher) is kind and dispatcher.spec.groups == groups
        assert (dispatcher.spec.num_chunks, dispatcher.spec.payload) == (3, Payload("fp8"))
