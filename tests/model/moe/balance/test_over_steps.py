"""Balance over the whole optimizer step: the slope that it uses, every split of a step, and what is remembered."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.distributed.collectives import world_group
from moe_train.model.moe.balance.base import Scheduled
from moe_train.model.moe.balance.build import make_balance_terms
from moe_train.model.moe.balance.cv_squared import SquaredVariation, cv_squared, cv_squared_slope
from moe_train.model.moe.balance.switch_aux import SwitchAux, switch_balance
from moe_train.model.moe.routers.base import RouterOptions
from moe_train.model.moe.routers.last_step import LAST_STEP_BUFFERS, REMEMBERED, LastStep, is_remembered, remember
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.objective import TrainingObjective
from moe_train.model.step_size import StepSize
from moe_train.ops.keyed_random import combine, make_key
from tests.model.moe.balance.contexts import after
from tests.model.small import random_ids, small_config, small_model, tokens_of

HIDDEN, EXPERTS, TOKENS = 4, 6, 48
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64; another split adds in another order
TERMS = {
    "importance": SquaredVariation(0.7, "importance"),
    "load": SquaredVariation(0.7, "load"),
    "switch": SwitchAux(0.7),
}
POSITIVE = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(values=POSITIVE)
def test_the_slope_is_the_gradient_and_sees_no_scale(values):
    v = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cv_squared(v), v)
    slope = cv_squared_slope(v.detach())
    # 1e-10 in the denominator is differentiated in the one and not in the other.
    torch.testing.assert_close(slope, gradient, rtol=1e-5, atol=1e-7)
    assert (slope * v.detach()).sum().abs() < 1e-9
    torch.testing.assert_close(cv_squared_slope(3 * v.detach()), slope / 3, rtol=1e-5, atol=1e-7)


def test_the_slope_of_nothing_is_zero():
    assert cv_squared_slope(torch.zeros(2, 5)).abs().max() == 0


def make_router():
    router = NoisyTopKRouter(HIDDEN, EXPERTS, 2, 1e-2, True, layer_key=3).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return router


def sums_of(router, x, keys):
    return RoutingSums.stack([router(x, keys).sums])


def inputs(seed):
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, combine(make_key("t"), torch.arange(TOKENS) + 1000 * seed)


def of_split(term, num_parts):
    """Mean of the parts' losses and gradients, as the engine takes it, of a step behind another one."""
    router, (x, keys) = make_router(), inputs(1)
    last = sums_of(router, *inputs(2))
    size = StepSize(num_parts, TOKENS, TOKENS)
    total, grads = 0.0, None
    for here in torch.arange(TOKENS).chunk(num_parts):
        loss = term.loss(sums_of(router, x[here], keys[here]), after(last, TOKENS, size))
        found = torch.autograd.grad(loss, list(router.parameters()), allow_unused=True, materialize_grads=True)
        total = total + loss.detach() / num_parts
        grads = [g / num_parts + (0 if grads is None else grads[i]) for i, g in enumerate(found)]
    return total, grads


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("num_parts", [2, 4, 16])
def test_every_split_of_a_step_is_the_same(name, num_parts):
    whole, whole_grads = of_split(TERMS[name], 1)
    loss, grads = of_split(TERMS[name], num_parts)
    torch.testing.assert_close(loss, whole, **CLOSE)
    for here, there in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(here, there, **CLOSE)
    assert any(grad.abs().sum() > 1e-3 for grad in whole_grads)


@pytest.mark.parametrize("name", ["importance", "load"])
def test_the_gradient_is_that_of_cv_squared_where_the_steps_are_alike(name):
    """At u = the step's own sums, the linear form has the gradient of CV^2 over the step: wrong by 2 is seen here."""
    router, (x, keys) = make_router(), inputs(1)
    sums = sums_of(router, x, keys)
    exact = torch.autograd.grad(
        0.7 * cv_squared(getattr(sums, name)).sum(), list(router.parameters()), allow_unused=True
    )
    size = StepSize(4, TOKENS, TOKENS)
    grads = None
    for here in torch.arange(TOKENS).chunk(4):
        loss = TERMS[name].loss(sums_of(router, x[here], keys[here]), after(sums, TOKENS, size))
        found = torch.autograd.grad(loss, list(router.parameters()), allow_unused=True)
        grads = (
            found if grads is None else [a + b if b is not None else None for a, b in zip(grads, found, strict=True)]
        )
    for linear, gradient in zip(grads, exact, strict=True):
        if gradient is not None:
            torch.testing.assert_close(linear / 4, gradient, rtol=1e-5, atol=1e-9)  # 1e-10 in the denominator


@pytest.mark.parametrize("wrong", [StepSize(8, TOKENS, TOKENS), StepSize(4, 2 * TOKENS, TOKENS)])
def test_a_size_that_is_wrong_by_two_doubles_or_halves_the_gradient(wrong):
    router, (x, keys) = make_router(), inputs(1)
    sums, last = sums_of(router, x, keys), sums_of(router, *inputs(2))
    right = StepSize(4, TOKENS, TOKENS)
    losses = [SquaredVariation(1.0, "importance").loss(sums, after(last, TOKENS, size)) for size in (right, wrong)]
    ratio = (losses[1] / losses[0]).item()
    assert ratio == pytest.approx(2.0 if wrong.num_parts == 8 else 0.5)


def test_switch_takes_the_shares_of_the_last_step():
    router = make_router()
    sums, last = sums_of(router, *inputs(1)), sums_of(router, *inputs(2))
    value = SwitchAux(0.3).loss(sums, after(last, TOKENS, StepSize.of_one_part(TOKENS)))
    share, probability = last.counts[0] / last.counts.sum(), sums.probability[0] / TOKENS
    expected = 0.3 * EXPERTS * sum(f * p for f, p in zip(share, probability, strict=True))
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(
        SwitchAux(0.3).value_of_step(sums), 0.3 * switch_balance(sums.counts, sums.probability).sum()
    )


@pytest.mark.parametrize("name", TERMS)
def test_a_first_step_has_no_term(name):
    router = make_router()
    sums = sums_of(router, *inputs(1))
    loss = TERMS[name].loss(sums, after(sums, TOKENS, StepSize.of_one_part(TOKENS), known=0.0))
    assert loss == 0 and loss.isfinite()


def test_buffers_are_only_what_is_needed_and_are_filled_by_a_step():
    router = NoisyTopKRouter(HIDDEN, EXPERTS, 2, 1e-2, True, 3, RouterOptions(remembered_sums=frozenset({"load"})))
    assert {name for name, _ in router.named_buffers()} == {"balance_load", "balance_known"}
    assert all(is_remembered(f"blocks.1.feed_forward.router.{name}") for name in LAST_STEP_BUFFERS)
    assert not is_remembered("blocks.1.feed_forward.router.selection_bias")
    unset = LastStep.of([router], EXPERTS, torch.device("cpu"))
    assert unset.known_L.tolist() == [0.0]
    sums = sums_of(make_router(), *inputs(1))
    remember([router], sums, TOKENS)
    found = LastStep.of([router], EXPERTS, torch.device("cpu"))
    torch.testing.assert_close(found.load_LE.double(), sums.load.detach() / TOKENS, rtol=1e-6, atol=0)  # fp32
    assert found.known_L.tolist() == [1.0] and found.importance_LE.abs().max() == 0
    assert set(REMEMBERED) == {"importance", "load", "share"}


MOE = {"num_experts": 4, "top_k": 2, "importance_cv2_coef": 0.3, "load_cv2_coef": 0.2, "switch_aux_coef": 0.1}
BATCH, LENGTH = 8, 6


def two_steps(rank, world_size, num_micro_steps):
    """Reported losses of two steps, the gradient of the second, and what is remembered of it."""
    model = small_model(small_config(moe_every=2, moe=MOE)).train()
    terms = make_balance_terms(small_config(moe_every=2, moe=MOE).moe)
    objective = TrainingObjective(model, terms, world_group())
    num_parts = world_size * num_micro_steps
    size = StepSize(num_parts, BATCH * LENGTH, BATCH * LENGTH)
    shown = []
    for step in range(2):
        model.zero_grad()
        found, parts = [], 0.0
        for micro in range(num_micro_steps):
            each = BATCH // num_parts
            here = torch.arange(each) + (micro * world_size + rank) * each
            ids = random_ids(BATCH, LENGTH, seed=step)[here]
            tokens = tokens_of(ids, step=step)
            tokens.sequences_B.copy_(here + 100 * step)
            losses = objective(tokens, ids, size)
            losses.total.backward()
            found.append(losses.sums)
            parts = parts + losses.shown / num_micro_steps
        value = objective.after_step(functools.reduce(RoutingSums.plus, found), step, size, skipped=False)
        shown.append((parts, value))
    router = model.routers[0]
    grads = [parameter.grad / num_micro_steps for parameter in router.parameters()]
    return shown, grads, router.balance_importance, router.balance_share


@pytest.mark.parametrize(("pool", "micro_steps"), [("pool2", 1), ("pool2", 4), ("pool4", 2)])
def test_ranks_and_micro_steps_give_the_same_objective(pool, micro_steps, request):
    shown, grads, importance, share = two_steps(0, 1, 1)
    results = request.getfixturevalue(pool).run(two_steps, micro_steps, timeout=60)
    for step in range(2):
        mean = sum(result[0][step][0] for result in results) / len(results)
        torch.testing.assert_close(mean, shown[step][0], **CLOSE)
        for result in results:
            torch.testing.assert_close(result[0][step][1], shown[step][1], **CLOSE)
        assert shown[step][1] > 0.01  # the true value, also of the first step
    for index, grad in enumerate(grads):
        torch.testing.assert_close(sum(result[1][index] for result in results) / len(results), grad, **CLOSE)
        assert grad.abs().sum() > 1e-4
    for result in results:
        torch.testing.assert_close(result[2], importance, rtol=1e-6, atol=1e-9)
        assert torch.equal(result[3], share)


def test_a_skipped_step_is_not_remembered():
    model = small_model(small_config(moe_every=2, moe=MOE)).train()
    term = Scheduled(SquaredVariation(0.3, "importance"), is_of_step=True)
    objective, ids = TrainingObjective(model, (term,), None), random_ids(2, LENGTH)
    size = StepSize.of_one_part(ids.numel())
    losses = objective(tokens_of(ids), ids, size)
    value = objective.after_step(losses.sums, 0, size, skipped=True)
    assert value > 0 and model.routers[0].balance_known == 0
    objective.after_step(losses.sums, 0, size, skipped=False)
    assert model.routers[0].balance_known == 1
