"""Switch auxiliary loss and z-loss: formulas, scopes, and every loss's gradient against finite differences in fp64."""

import math

import pytest
import torch

from moe_train.config.moe import MoEConfig
from moe_train.distributed.collectives import world_group
from moe_train.model.moe.balance.base import Scheduled
from moe_train.model.moe.balance.build import make_balance_terms, make_bias_rule
from moe_train.model.moe.balance.cv_squared import SquaredVariation
from moe_train.model.moe.balance.switch_aux import SwitchAux
from moe_train.model.moe.balance.z_loss import ZLoss
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.model.moe.routers.sigmoid_topk import SigmoidTopKRouter
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.model.moe.steps import RoutingSums
from moe_train.ops.keyed_random import combine, make_key
from tests.model.moe.balance.contexts import alone
from tests.model.small import sums_with

HIDDEN, EXPERTS, SEQUENCES, LENGTH, TOP_K = 4, 6, 8, 3, 2
TOKENS = SEQUENCES * LENGTH


def make_router(kind="softmax", std=0.5):
    router = {
        "softmax": lambda: SoftmaxTopKRouter(HIDDEN, EXPERTS, TOP_K, True, 1.0),
        "sigmoid": lambda: SigmoidTopKRouter(HIDDEN, EXPERTS, TOP_K, True, 1.0),
        "noisy": lambda: NoisyTopKRouter(HIDDEN, EXPERTS, TOP_K, 1e-2, True, layer_key=3),
    }[kind]().double()
    generator = torch.Generator().manual_seed(5)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
    return router


def inputs():
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return x, combine(make_key("t"), torch.arange(TOKENS))


def part(rank, world_size):
    return slice(rank * TOKENS // world_size, (rank + 1) * TOKENS // world_size)


def route(router, x, keys, sequences=SEQUENCES):
    return RoutingSums.stack([router(x, keys, sequences).sums])


def with_context(sums):
    return sums, alone(sums)


def slow_switch(router, x, keys, num_scopes):
    """E sum f p over each scope, averaged."""
    routing = router(x, keys)
    probability = (x @ router.gate.weight.T).softmax(1)
    values = []
    for tokens in torch.arange(len(x)).chunk(num_scopes):
        value = 0.0
        for i in range(EXPERTS):
            f = sum(routing.experts_TK[t].tolist().count(i) for t in tokens) / (len(tokens) * TOP_K)
            value = value + EXPERTS * f * sum(probability[t, i] for t in tokens) / len(tokens)
        values.append(value)
    return sum(values) / len(values)


@pytest.mark.parametrize(("scope", "num_scopes"), [("micro_batch", 1), ("global", 1), ("sequence", SEQUENCES)])
def test_switch_formula(scope, num_scopes):
    router, (x, keys) = make_router(), inputs()
    value = SwitchAux(0.3, scope).loss(*with_context(route(router, x, keys)))
    torch.testing.assert_close(value, 0.3 * slow_switch(router, x, keys, num_scopes), rtol=1e-12, atol=0)  # fp64


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global"])
def test_switch_is_its_coefficient_when_balanced_and_more_when_collapsed(scope):
    even = torch.full((1, EXPERTS), TOKENS * TOP_K // EXPERTS)
    balanced = sums_with(
        even.shape,
        counts=even,
        probability=torch.full((1, EXPERTS), TOKENS / EXPERTS, dtype=torch.float64),
        sequence_balance=torch.tensor([float(SEQUENCES)], dtype=torch.float64),
        sequences=torch.tensor([SEQUENCES]),
    )
    assert SwitchAux(0.01, scope).loss(*with_context(balanced)).item() == pytest.approx(0.01)
    router, (x, keys) = make_router(), inputs()
    x[:, 0], router.gate.weight.data = 1, torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
    router.gate.weight.data[:TOP_K, 0] = 80.0  # all tokens on two experts, with probability 1/2 each
    collapsed = SwitchAux(0.01, scope).loss(*with_context(route(router, x, keys)))
    assert collapsed.item() == pytest.approx(0.01 * EXPERTS / TOP_K)


def test_z_loss_formula_and_layers():
    router, (x, keys) = make_router(std=1.0), inputs()
    expected = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in (x @ router.gate.weight.T).tolist()]
    sums = route(router, x, keys)
    assert ZLoss(1e-3).loss(*with_context(sums)).item() == pytest.approx(1e-3 * sum(expected) / TOKENS, rel=1e-12)
    both = RoutingSums.stack([router(x, keys).sums, router(2 * x, keys).sums])
    doubled = ZLoss(1e-3).loss(*with_context(route(router, 2 * x, keys)))
    torch.testing.assert_close(ZLoss(1e-3).loss(*with_context(both)), ZLoss(1e-3).loss(*with_context(sums)) + doubled)


TERMS = {
    "importance": SquaredVariation(0.7, "importance", "micro_step"),
    "load": SquaredVariation(0.7, "load", "micro_step"),
    "switch, micro-batch": SwitchAux(0.7, "micro_batch"),
    "switch, sequence": SwitchAux(0.7, "sequence"),
    "switch, global": SwitchAux(0.7, "global"),
    "z": ZLoss(0.7),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy"])
def test_gradient_against_finite_differences(name, kind):
    router, (x, keys) = make_router(kind), inputs()

    def loss(*weights):
        found = torch.func.functional_call(router, dict(zip(names, weights)), (x, keys, SEQUENCES))
        return TERMS[name].loss(*with_context(RoutingSums.stack([found.sums])))

    names, weights = zip(*((n, p.detach().clone().requires_grad_()) for n, p in router.named_parameters()))
    if name == "load" and kind != "noisy":
        assert not loss(*weights).requires_grad  # counts: the configuration refuses the combination
        return
    # The choice of experts is piecewise constant; no step of 1e-6 crosses a tie here.
    assert torch.autograd.gradcheck(loss, weights)
    assert (
        sum(
            grad.abs().sum()
            for grad in torch.autograd.grad(loss(*weights), weights, allow_unused=True)
            if grad is not None
        )
        > 1e-4
    )


def on_rank(rank, world_size, name):
    router, (x, keys), here = make_router("noisy"), inputs(), part(rank, world_size)
    sums = route(router, x[here], keys[here], SEQUENCES // world_size)
    loss = TERMS[name].loss(sums, alone(sums, world_group()))
    grads = torch.autograd.grad(loss, list(router.parameters()), allow_unused=True, materialize_grads=True)
    return loss.detach(), grads


@pytest.mark.parametrize("name", [name for name in TERMS if name != "switch, micro-batch"])
@pytest.mark.parametrize("pool", ["pool2", "pool4"])
def test_ranks_together_equal_one_process(name, pool, request):
    """Loss and gradient as DeepSpeed averages them over ranks."""
    loss, grads = on_rank(0, 1, name)
    results = request.getfixturevalue(pool).run(on_rank, name, timeout=60)
    close = {"rtol": 1e-9, "atol": 1e-12}  # fp64; sums over ranks are added in another order
    torch.testing.assert_close(sum(result[0] for result in results) / len(results), loss, **close)
    for i, grad in enumerate(grads):
        torch.testing.assert_close(sum(result[1][i] for result in results) / len(results), grad, **close)
    assert any(grad.abs().sum() > 1e-4 for grad in grads)


def test_a_micro_batch_is_a_ranks_own(pool2):
    loss, _ = on_rank(0, 1, "switch, micro-batch")
    results = pool2.run(on_rank, "switch, micro-batch", timeout=60)
    assert results[0][0] != results[1][0]
    assert abs((results[0][0] + results[1][0]) / 2 - loss) > 1e-4


def test_every_weight_of_the_configuration_makes_its_term():
    moe = MoEConfig(
        importance_cv2_coef=0.1,
        load_cv2_coef=0.2,
        switch_aux_coef=0.3,
        switch_scope="sequence",
        z_loss_coef=0.4,
        bias_update_rate=0.5,
        balance_scope="rank",
        coef_schedules={"z_loss_coef": [[0, 1], [10, 0]], "bias_update_rate": [[5, 2]]},
    )
    terms = make_balance_terms(moe)
    assert [term.rule for term in terms] == [
        SquaredVariation(0.1, "importance", "rank"),
        SquaredVariation(0.2, "load", "rank"),
        SwitchAux(0.3, "sequence"),
        ZLoss(0.4),
    ]
    assert [term.points for term in terms] == [(), (), (), ((0, 1.0), (10, 0.0))]
    rule = make_bias_rule(moe)
    assert rule is not None and rule.rule.rate == 0.5 and rule.points == ((5, 2.0),)
    nothing = MoEConfig(importance_cv2_coef=0, load_cv2_coef=0)
    assert make_balance_terms(nothing) == [] and make_bias_rule(nothing) is None


def test_factors_are_linear_between_points_and_constant_outside():
    schedule = Scheduled(None, ((10, 1.0), (20, 0.0), (40, 0.5)))
    assert [schedule.factor(step) for step in (0, 10, 15, 20, 30, 40, 99)] == [1, 1, 0.5, 0, 0.25, 0.5, 0.5]
    assert Scheduled(None).factor(7) == 1
