"""Noisy top-k gating: formulas, noise that belongs to the token, and the smooth load estimate."""

import math

import pytest
import torch

from moe_train.model.moe.routers.base import expert_keys
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter, probability_in_top_k
from moe_train.ops.keyed_random import combine, make_key, normal

TOKENS, HIDDEN, EXPERTS = 60, 5, 7


def make(top_k=2, renormalize=True, std=1.0, dtype=torch.float64, experts=EXPERTS, layer_key=11) -> NoisyTopKRouter:
    router = NoisyTopKRouter(HIDDEN, experts, top_k, 1e-2, renormalize, layer_key).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * std
    return router


def tokens(count=TOKENS, start=0, dtype=torch.float64):
    x = torch.randn(1000, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x[start : start + count], combine(make_key("t"), torch.arange(start, start + count))


def test_both_maps_start_at_zero_and_have_no_bias():
    router = NoisyTopKRouter(HIDDEN, EXPERTS, 2, 1e-2, True, 0)
    assert sorted(name for name, _ in router.named_parameters()) == ["gate.weight", "noise.weight"]
    for module in (router.gate, router.noise):
        (value,) = module.initial_values().values()
        assert value.value == 0.0


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_training_noise_has_the_learned_deviation(top_k, renormalize):
    """H = clean + eps * (softplus(x W_noise) + 1e-2), and the gates are its softmax."""
    router = make(top_k, renormalize)
    x, keys = tokens()
    routing = router(x, keys)
    clean = x @ router.gate.weight.T
    sigma = torch.log1p(torch.exp(x @ router.noise.weight.T)) + 1e-2
    eps = normal(expert_keys(keys, 11, EXPERTS))
    noisy = clean + eps * sigma
    expected = noisy.topk(top_k, dim=1).indices
    assert torch.equal(routing.experts_TK, expected)
    scores = noisy.gather(1, expected).softmax(1) if renormalize else noisy.softmax(1).gather(1, expected)
    torch.testing.assert_close(routing.gates_TK, scores, rtol=0, atol=1e-12)  # fp64
    torch.testing.assert_close(routing.logits_TE, clean, rtol=0, atol=1e-12)
    load = probability_in_top_k(clean, noisy, sigma, top_k).sum(0)
    torch.testing.assert_close(routing.sums.load, load, rtol=0, atol=1e-10)
    importance = torch.zeros(EXPERTS, dtype=torch.float64).index_add(0, expected.flatten(), scores.flatten())
    torch.testing.assert_close(routing.sums.importance, importance, rtol=0, atol=1e-12)


def test_noise_at_initialisation_is_independent_and_of_deviation_log_2():
    router = make(EXPERTS, renormalize=False, std=0.0)
    count = 20_000
    x, keys = torch.zeros(count, HIDDEN, dtype=torch.float64), combine(make_key("many"), torch.arange(count))
    routing = router(x, keys)
    logits = torch.empty(count, EXPERTS, dtype=torch.float64).scatter(1, routing.experts_TK, routing.gates_TK.log())
    centred = logits - logits.mean(1, keepdim=True)  # the softmax's denominator is gone
    # Independent draws of variance s^2 minus their mean: covariance s^2 (I - 1/E).
    expected = (math.log(2) + 1e-2) ** 2 * (torch.eye(EXPERTS, dtype=torch.float64) - 1 / EXPERTS)
    # Standard errors are about s^2 sqrt(2 / count) = 0.005; five of them.
    assert (centred.T @ centred / count - expected).abs().max() < 0.025


@pytest.mark.parametrize("renormalize", [True, False])
def test_evaluation_has_no_noise(renormalize):
    router = make(renormalize=renormalize).eval()
    x, keys = tokens()
    routing = router(x, keys)
    clean = x @ router.gate.weight.T
    assert torch.equal(routing.experts_TK, clean.topk(2, dim=1).indices)
    assert torch.equal(routing.experts_TK, router(x, keys + 1).experts_TK)
    chosen = clean.gather(1, routing.experts_TK)
    gates = chosen.softmax(1) if renormalize else chosen.exp() / clean.exp().sum(1, keepdim=True)
    torch.testing.assert_close(routing.gates_TK, gates, rtol=0, atol=1e-12)  # fp64
    assert torch.equal(routing.sums.load, routing.sums.counts.double())
    assert not torch.equal(make().train()(x, keys).experts_TK, routing.experts_TK)


def test_one_expert_a_token_is_gated_by_its_probability():
    """With renormalisation every gate would be 1, and the task would not reach the router."""
    x, keys = tokens()
    switch = make(top_k=1, renormalize=False)
    routing = switch(x, keys)
    assert (routing.gates_TK < 1).all()
    routing.gates_TK.sum().backward()
    assert switch.gate.weight.grad.abs().sum() > 0.1
    other = make(top_k=1, renormalize=True)
    routing = other(x, keys)
    assert (routing.gates_TK == 1).all()
    routing.gates_TK.sum().backward()
    assert not other.gate.weight.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_zero_initialisation_uses_all_experts_evenly(training):
    router = make(std=0.0, dtype=torch.float32, experts=8).train(training)
    keys = combine(make_key("many"), torch.arange(8000))
    routing = router(torch.randn(8000, HIDDEN), keys)
    assert (routing.sums.counts - 2000).abs().max() < 6 * (8000 * 0.25 * 0.75) ** 0.5  # six standard deviations
    if training:
        # P varies less than the count; the same bound serves.
        assert (routing.sums.load - 2000).abs().max() < 6 * (8000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("std", [0.0, 1.0])
def test_routing_does_not_depend_on_how_tokens_are_batched(training, std):
    router = make(std=std).train(training)
    x, keys = tokens()
    whole = router(x, keys)
    halves = [router(x[:23], keys[:23]), router(x[23:], keys[23:])]
    shuffle = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    shuffled = router(x[shuffle], keys[shuffle])
    assert torch.equal(whole.experts_TK, torch.cat([half.experts_TK for half in halves]))
    assert torch.equal(whole.experts_TK[shuffle], shuffled.experts_TK)
    # fp64; a matrix product of another height may add in another order.
    torch.testing.assert_close(whole.gates_TK[shuffle], shuffled.gates_TK, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.sums.load, halves[0].sums.load + halves[1].sums.load, rtol=0, atol=1e-10)
    assert torch.equal(whole.sums.counts, halves[0].sums.counts + halves[1].sums.counts)
    again = router(x, keys)
    assert torch.equal(again.gates_TK, whole.gates_TK)


def test_noise_differs_between_tokens_steps_and_layers():
    x, keys = tokens()
    same_rows = x[:1].expand(TOKENS, HIDDEN)
    gates = make()(same_rows, keys).gates_TK
    assert len(gates.detach().unique()) > TOKENS  # every token has its own
    assert not torch.equal(make(layer_key=12)(same_rows, keys).experts_TK, make()(same_rows, keys).experts_TK)


def test_weights_of_a_narrow_dtype_are_used_in_fp32():
    router = make(dtype=torch.bfloat16)
    x, keys = tokens(dtype=torch.bfloat16)
    routing = router(x, keys)
    assert routing.gates_TK.dtype == routing.logits_TE.dtype == routing.sums.load.dtype == torch.float32
    expected = x.double() @ router.gate.weight.double().T
    # Products of bf16 numbers are exact in fp32, five are added.
    torch.testing.assert_close(routing.logits_TE.double(), expected, rtol=0, atol=1e-5)


def sample(draws, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(1, experts, generator=generator, dtype=torch.float64)
    sigma = torch.rand(1, experts, generator=generator, dtype=torch.float64) + 0.2
    noise = torch.randn(draws, experts, generator=generator, dtype=torch.float64)
    clean, sigma = clean.expand(draws, -1), sigma.expand(draws, -1)
    return clean, clean + noise * sigma, sigma


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mean_probability_is_the_frequency_of_being_chosen(top_k):
    draws = 200_000
    clean, noisy, sigma = sample(draws, 6)
    probability = probability_in_top_k(clean, noisy, sigma, top_k)
    assert ((probability >= 0) & (probability <= 1)).all()
    frequency = torch.bincount(noisy.topk(top_k, dim=1).indices.flatten(), minlength=6) / draws
    # Standard errors are at most sqrt(0.25 / draws) = 0.0011 each; the bound is five of the difference.
    assert (probability.mean(0) - frequency).abs().max() < 0.008
    assert frequency.max() - frequency.min() > 0.1  # a case in which experts differ
    # The sum's deviation over draws is below 1: a standard error of 0.0022.
    assert abs(probability.sum(1).mean().item() - top_k) < 0.01


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_probability_against_a_loop(top_k):
    clean, noisy, sigma = sample(20, 6, seed=1)
    probability = probability_in_top_k(clean, noisy, sigma, top_k)
    for t in range(20):
        for i in range(6):
            others = sorted((noisy[t, j].item() for j in range(6) if j != i), reverse=True)
            z = (clean[t, i].item() - others[top_k - 1]) / sigma[t, i].item()
            assert abs(probability[t, i].item() - 0.5 * (1 + math.erf(z / math.sqrt(2)))) < 1e-12  # fp64


def test_probability_with_all_experts_is_one_and_has_no_gradient():
    clean, noisy, sigma = sample(9, 6)
    assert torch.equal(probability_in_top_k(clean.clone().requires_grad_(), noisy, sigma, 6), torch.ones(9, 6))
    router = make(top_k=EXPERTS)
    load = router(*tokens()).sums.load
    assert (load == TOKENS).all()
    assert not load.requires_grad


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_probability_gradient_against_finite_differences(top_k):
    tensors = [t.clone().requires_grad_() for t in sample(5, 6, seed=2)]
    assert torch.autograd.gradcheck(lambda *t: probability_in_top_k(*t, top_k), tensors)


def test_relabelling_experts_permutes_the_probability():
    tensors = sample(30, 6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    permuted = probability_in_top_k(*(t[:, order] for t in tensors), 2)
    assert torch.equal(permuted, probability_in_top_k(*tensors, 2)[:, order])


def test_unselected_logits_feel_the_load_but_not_the_task():
    router = make(top_k=2, std=0.3)  # small logits: no expert is out of reach
    x, keys = tokens(1)
    routing = router(x, keys)
    unselected = [i for i in range(EXPERTS) if i not in routing.experts_TK[0].tolist()]
    task = (routing.gates_TK * torch.tensor([[1.0, -3.0]], dtype=torch.float64)).sum()
    task_grads = torch.autograd.grad(task, [router.gate.weight, router.noise.weight], retain_graph=True)
    for grad in task_grads:
        assert not grad[unselected].any()
        assert grad.abs().sum() > 1e-3
    for expert in unselected:
        grads = torch.autograd.grad(
            routing.sums.load[expert], [router.gate.weight, router.noise.weight], retain_graph=True
        )
        assert all(grad[expert].abs().sum() > 1e-6 for grad in grads)
