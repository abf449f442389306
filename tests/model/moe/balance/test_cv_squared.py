"""The squared-coefficient-of-variation terms: formula, scope, and gradients over ranks."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.moe import MoEConfig
from moe_train.distributed.collectives import world_group
from moe_train.model.moe.balance.base import Scheduled
from moe_train.model.moe.balance.build import make_balance_terms
from moe_train.model.moe.balance.cv_squared import SquaredVariation, cv_squared
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.model.moe.steps import RoutingSums
from moe_train.ops.keyed_random import combine, make_key
from tests.model.moe.balance.contexts import alone
from tests.model.small import sums_with

HIDDEN, EXPERTS, TOKENS = 4, 6, 24
POSITIVE = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


def sums_of(importance, load=None):
    importance = torch.as_tensor(importance, dtype=torch.float64)
    load = importance if load is None else torch.as_tensor(load, dtype=torch.float64)
    return sums_with(importance.shape, importance=importance, load=load)


@settings(max_examples=60, deadline=None)
@given(values=POSITIVE)
def test_formula(values):
    result = cv_squared(torch.tensor(values, dtype=torch.float64)).item()
    expected = statistics.pvariance(values) / statistics.fmean(values) ** 2
    assert result == pytest.approx(expected, rel=1e-5, abs=1e-12)  # 1e-10 is added to a squared mean of 1e-4 or more


@settings(max_examples=30, deadline=None)
@given(values=POSITIVE, factor=st.floats(1.0, 100))
def test_is_of_no_unit_and_blind_to_names(values, factor):
    tensor = torch.tensor(values, dtype=torch.float64)
    assert cv_squared(tensor * factor).item() == pytest.approx(cv_squared(tensor).item(), rel=1e-4, abs=1e-10)
    assert cv_squared(tensor.flip(0)).item() == pytest.approx(cv_squared(tensor).item(), rel=1e-9, abs=1e-12)


def test_one_expert_has_no_imbalance():
    assert cv_squared(torch.tensor([7.0])) == 0


def test_no_token_gives_a_finite_zero():
    values = torch.zeros(4, requires_grad=True)
    cv_squared(values).backward()
    assert cv_squared(values) == 0
    assert values.grad.isfinite().all()


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (64, 8), (4, 4)])
def test_all_tokens_on_the_same_experts(experts, top_k):
    load = torch.zeros(experts, dtype=torch.float64)
    load[:top_k] = 100.0
    assert cv_squared(load).item() == pytest.approx(experts / top_k - 1, rel=1e-9)
    assert (load.max() / load.mean()).item() == pytest.approx(experts / top_k)


def test_layers_are_added_and_weighted():
    importance, load = [[1.0, 3.0], [2.0, 2.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 3.0], [1.0, 1.0]]
    sums = sums_of(importance, load)
    # CV^2 of the rows: 1/4, 0, 1; and 0, 1/4, 0.
    for scope in ("micro_step", "rank"):
        assert SquaredVariation(0.5, "importance", scope).loss(sums, alone(sums)).item() == pytest.approx(
            0.625, rel=1e-9
        )
        assert SquaredVariation(2.0, "load", scope).loss(sums, alone(sums)).item() == pytest.approx(0.5, rel=1e-9)
    assert SquaredVariation(0.5, "importance").value_of_step(sums).item() == pytest.approx(0.625, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), experts=st.integers(1, 8), ranks=st.integers(1, 5))
def test_global_is_at_most_the_mean_of_local(data, experts, ranks):
    """Every rank has as many tokens, whose gates sum to one: equal means, and variance is convex."""
    rows = st.lists(st.floats(0, 1), min_size=experts, max_size=experts).filter(lambda row: sum(row) > 0.1)
    local = torch.tensor(data.draw(st.lists(rows, min_size=ranks, max_size=ranks)), dtype=torch.float64)
    local = local / local.sum(1, keepdim=True) * 10
    # Rounding, and the 1e-10 beside a squared mean that is larger for the sum.
    assert cv_squared(local.sum(0)) <= cv_squared(local).mean() + 1e-9


@pytest.mark.parametrize(
    ("importance", "load", "kinds"),
    [
        (0.1, 0.2, [SquaredVariation(0.1, "importance"), SquaredVariation(0.2, "load")]),
        (0.0, 0.2, [SquaredVariation(0.2, "load")]),
        (0.0, 0.0, []),
    ],
)
def test_terms_of_a_configuration(importance, load, kinds):
    terms = make_balance_terms(MoEConfig(importance_cv2_coef=importance, load_cv2_coef=load))
    assert terms == [Scheduled(kind, is_of_step=True) for kind in kinds]


def route_part(rank, world_size, scope):
    """The balance loss and the router's gradients of this rank's share of the tokens."""
    router = NoisyTopKRouter(HIDDEN, EXPERTS, 2, 1e-2, True, layer_key=3).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    keys = combine(make_key("t"), torch.arange(TOKENS))
    share = slice(rank * TOKENS // world_size, (rank + 1) * TOKENS // world_size)
    routing = router(x[share], keys[share])
    sums = RoutingSums.stack([routing.sums])
    context = alone(sums, world_group())
    assert (context.group is None) == (world_size == 1)
    loss = SquaredVariation(0.3, "importance", scope).loss(sums, context)
    loss = loss + SquaredVariation(0.7, "load", scope).loss(sums, context)
    grads = torch.autograd.grad(loss, list(router.parameters()))
    importance = SquaredVariation(1.0, "importance", scope).loss(sums, context)
    return loss.detach(), [grad.detach() for grad in grads], importance.detach()


@pytest.mark.parametrize("pool", ["pool2", "pool4"])
def test_a_micro_step_equals_one_process(pool, request):
    loss, grads, importance = route_part(0, 1, "micro_step")
    results = request.getfixturevalue(pool).run(route_part, "micro_step", timeout=60)
    for rank_loss, _, rank_importance in results:
        # fp64; the ranks' sums are added in another order.
        torch.testing.assert_close(rank_loss, loss, rtol=1e-11, atol=0)
        torch.testing.assert_close(rank_importance, importance, rtol=1e-11, atol=0)
    for i, grad in enumerate(grads):
        averaged = sum(rank_grads[i] for _, rank_grads, _ in results) / len(results)  # as DeepSpeed averages
        torch.testing.assert_close(averaged, grad, rtol=1e-9, atol=1e-12)
        assert grad.abs().sum() > 1e-3
    local = request.getfixturevalue(pool).run(route_part, "rank", timeout=60)
    assert importance < sum(rank_importance for _, _, rank_importance in local) / len(local)
    assert not torch.equal(local[0][0], local[1][0])
