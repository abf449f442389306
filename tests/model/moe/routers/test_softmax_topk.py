"""Plain top-k gating."""

import pytest
import torch

from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.ops.keyed_random import combine, make_key


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gates_formula(renormalize, training):
    router = SoftmaxTopKRouter(5, 6, 3, renormalize, init_std=0.02).double().train(training)
    generator = torch.Generator().manual_seed(0)
    router.gate.weight.data = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    keys = combine(make_key("t"), torch.arange(40))
    routing = router(x, keys)
    scores = (x @ router.gate.weight.T).softmax(1)
    for t in range(40):
        best = sorted(range(6), key=lambda i: -scores[t, i].item())[:3]
        assert routing.experts_TK[t].tolist() == best
        expected = scores[t, best] / (scores[t, best].sum() if renormalize else 1)
        torch.testing.assert_close(routing.gates_TK[t], expected, rtol=0, atol=1e-14)  # fp64
    assert torch.equal(routing.experts_TK, router(x, keys + 1).experts_TK)
    assert torch.equal(routing.sums.load, routing.sums.counts.double())
    assert routing.sums.counts.sum() == 120
    (grad,) = torch.autograd.grad((routing.gates_TK**2).sum(), router.gate.weight)
    assert grad.abs().sum() > 1e-2


def test_equal_rows_are_spread_at_zero_weights():
    router = SoftmaxTopKRouter(5, 8, 2, True, init_std=0.02)
    router.gate.weight.data.zero_()
    counts = router(torch.randn(4000, 5), combine(make_key("t"), torch.arange(4000))).sums.counts
    assert (counts - 1000).abs().max() < 6 * (4000 * 0.25 * 0.75) ** 0.5  # six standard deviations
