"""Rows into expert order and back, against loops; gradients against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.ops.permute import expand_rows, gather_rows, invert_order, sort_assignments, weighted_sum


def chosen(tokens: int, top_k: int, num_experts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k, dim=1).indices


CASES = [
    pytest.param(chosen(13, 2, 5, 0), 5, id="random"),
    pytest.param(chosen(13, 5, 5, 1), 5, id="every expert"),
    pytest.param(torch.full((6, 1), 3), 5, id="all on one expert"),
    pytest.param(chosen(4, 2, 3, 2) * 3, 9, id="experts without token"),
    pytest.param(chosen(1, 1, 4, 3), 4, id="one token"),
    pytest.param(torch.empty(0, 2, dtype=torch.int64), 4, id="no token"),
]


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 20), num_experts=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_assignments_are_grouped_by_expert_in_token_order(tokens, num_experts, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    experts = chosen(tokens, top_k, num_experts, seed)
    order, counts = sort_assignments(experts, num_experts)
    flat = experts.flatten().tolist()
    expected = [a for e in range(num_experts) for a in range(len(flat)) if flat[a] == e]
    assert order.tolist() == expected
    assert counts.tolist() == [flat.count(e) for e in range(num_experts)]
    inverse = invert_order(order)
    assert [expected[i] for i in inverse.tolist()] == list(range(len(flat)))


@pytest.mark.parametrize(("experts", "num_experts"), CASES)
def test_expand_and_permute_against_a_loop(experts, num_experts):
    top_k = experts.shape[1]
    x = torch.randn(len(experts), 3, dtype=torch.float64)
    order, _ = sort_assignments(experts, num_experts)
    inverse = invert_order(order)
    rows = expand_rows(x, order, inverse, top_k)
    assert rows.shape == (experts.numel(), 3)
    for place, assignment in enumerate(order.tolist()):
        assert torch.equal(rows[place], x[assignment // top_k])
    back = gather_rows(rows, inverse, order)
    for assignment in range(experts.numel()):
        assert torch.equal(back[assignment], x[assignment // top_k])


@pytest.mark.parametrize(("experts", "num_experts"), CASES)
def test_weighted_sum_against_a_loop(experts, num_experts):
    tokens, top_k = experts.shape
    rows = torch.randn(experts.numel(), 3, dtype=torch.float64)
    gates = torch.rand(tokens, top_k, dtype=torch.float64)
    order, _ = sort_assignments(experts, num_experts)
    y = weighted_sum(rows, gates, invert_order(order), order)
    expected = torch.zeros(tokens, 3, dtype=torch.float64)
    for place, assignment in enumerate(order.tolist()):
        token, k = divmod(assignment, top_k)
        expected[token] += gates[token, k] * rows[place]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)  # fp64; the order of adding differs


@pytest.mark.parametrize(("experts", "num_experts"), CASES[:5])
def test_gradients_against_finite_differences(experts, num_experts):
    tokens, top_k = experts.shape
    order, _ = sort_assignments(experts, num_experts)
    inverse = invert_order(order)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(experts.numel(), 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: expand_rows(x, order, inverse, top_k), (x,))
    assert torch.autograd.gradcheck(lambda rows: gather_rows(rows, order, inverse), (rows,))
    assert torch.autograd.gradcheck(lambda rows, gates: weighted_sum(rows, gates, inverse, order), (rows, gates))


def test_no_token_has_gradients_of_its_shape():
    order = torch.empty(0, dtype=torch.int64)
    x = torch.empty(0, 3, requires_grad=True)
    gates = torch.empty(0, 2, requires_grad=True)
    weighted_sum(expand_rows(x, order, order, 2), gates, order, order).sum().backward()
    assert x.grad.shape == (0, 3)
    assert gates.grad.shape == (0, 2)


def test_weighted_sum_of_bf16_rows_accumulates_in_fp32():
    order = torch.arange(256)
    rows = torch.ones(256, 1, dtype=torch.bfloat16)
    gates = torch.full((1, 256), 1 / 256)
    y = weighted_sum(rows, gates + 2.0**-12, order, order)
    # In bf16 each gate 2^-8 + 2^-12 is exact, but a running sum of 8 bits stops growing at 1: 1.0625 is only reached
    # with more.
    assert y.dtype == torch.bfloat16
    assert y.item() == 1.0625


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_assignments_that_are_not_executed_add_nothing(share):
    """Gather, weigh and add with some assignments left out, against a loop, gradients included."""
    generator = torch.Generator().manual_seed(4)
    tokens, top_k, experts, width = 9, 2, 5, 3
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    kept = torch.rand(tokens, top_k, generator=generator) >= share
    order, counts = sort_assignments(chosen, experts, kept)
    assert counts.tolist() == [int(((chosen == i) & kept).sum()) for i in range(experts)]
    order = order[: int(counts.sum())]
    inverse = invert_order(order, tokens * top_k)
    assert all(
        inverse[a] == (order.tolist().index(a) if kept.flatten()[a] else len(order)) for a in range(len(inverse))
    )
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64, requires_grad=True)

    def run(x, gates):
        rows = expand_rows(x, order, inverse, top_k)
        factors = chosen.flatten()[order].unsqueeze(1) + 1.0  # "expert" i multiplies by i + 1
        return weighted_sum(rows * factors, gates, inverse, order)

    expected = [
        sum((gates[t, k] * (chosen[t, k] + 1) * x[t] for k in range(top_k) if kept[t, k]), 0 * x[t])
        for t in range(tokens)
    ]
    torch.testing.assert_close(run(x, gates), torch.stack(expected), rtol=1e-12, atol=0)  # fp64
    assert torch.autograd.gradcheck(run, (x, gates))
