"""The MoE layer on 1, 2 and 4 ranks against the slow dense definition in fp64, gradients included."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.distributed.mesh import create_mesh
from moe_train.model.layers import SwiGLU
from moe_train.model.moe.experts import GroupedExperts
from moe_train.model.moe.layer import MoELayer
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.ops.keyed_random import combine, make_key
from tests.model.moe.dispatchers import make_dispatcher
from tests.model.slow_moe import SlowMoE
from tests.model.small import context_of

HIDDEN, INNER, EXPERTS = 8, 12, 8  # whole 16 bytes in fp32, so that fp32 takes F.grouped_mm
LAYER_KEY = 77
NODE_SIZE = 2  # ranks
BIASED = 0  # this feature of every token is 1: its router weights are a bias
EVEN, UNEVEN, MINIMAL, EMPTY = [6, 6, 6, 6], [5, 9, 2, 7], [9, 1, 8, 1], [0, 9, 8, 0]
BIASES = {
    "random": [0.0] * EXPERTS,
    "experts without token": [0, -60, 0, -60, 0, 0, -60, -60],
    "only rank 0's experts": [60.0, 60.0] + [0.0] * 6,
    "all on one": [0, 0, 0, 0, 0, 0, 90.0, 45.0],
}


@dataclass(frozen=True)
class Case:
    """A layer's kind, where tokens go, and how many of them each rank has (the first `world` of the list)."""

    bias: str = "random"
    tokens: tuple[int, ...] = tuple(UNEVEN)
    top_k: int = 2
    noisy: bool = False
    dtype: torch.dtype = torch.float64
    dispatch: str = "flat"
    num_chunks: int = 1


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def global_weights(case: Case) -> dict[str, Tensor]:
    gate = draw(EXPERTS, HIDDEN, seed=1)
    gate[:, BIASED] = torch.tensor(BIASES[case.bias], dtype=torch.float64)
    return {
        "gate": gate,
        "noise": draw(EXPERTS, HIDDEN, seed=2),
        "gate_up": draw(EXPERTS, HIDDEN, 2 * INNER, seed=3, scale=HIDDEN**-0.5),
        "down": draw(EXPERTS, INNER, HIDDEN, seed=4, scale=INNER**-0.5),
    }


def global_tokens(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, upstream gradients and keys of all ranks' tokens."""
    x = draw(sum(case.tokens), HIDDEN, seed=5)
    x[:, BIASED] = 1
    return x, draw(*x.shape, seed=6), combine(make_key("t"), torch.arange(len(x)))


def make_layer(case: Case, ep_rank: int, ep_size: int, groups: tuple[Any, ...]) -> MoELayer:
    local = EXPERTS // ep_size
    here = slice(ep_rank * local, (ep_rank + 1) * local)
    weights = global_weights(case)
    renormalize = case.top_k > 1
    if case.noisy:
        router = NoisyTopKRouter(HIDDEN, EXPERTS, case.top_k, 1e-2, renormalize, LAYER_KEY)
        router.noise.weight.data = weights["noise"].to(case.dtype)
    else:
        router = SoftmaxTopKRouter(HIDDEN, EXPERTS, case.top_k, renormalize, init_std=0.02)
    router.gate.weight.data = weights["gate"].to(case.dtype)
    experts = GroupedExperts(HIDDEN, INNER, EXPERTS, local, here.start, 0.02, 0.02)
    experts.gate_up.data = weights["gate_up"][here].to(case.dtype)
    experts.down.data = weights["down"][here].to(case.dtype)
    return MoELayer(router, make_dispatcher(case.dispatch, groups, case.num_chunks), experts)


def run_layer(rank: int, world_size: int, case: Case, ep_size: int) -> dict[str, Tensor]:
    """Output, sums and gradients of one rank's tokens, the experts being spread over groups of ep_size ranks."""
    groups, ep_rank = (), 0
    if world_size > 1:
        mesh = create_mesh(ep_size, 60, node_size=NODE_SIZE if case.dispatch == "two_level" else None)
        groups, ep_rank = mesh.dispatch_groups, mesh.expert.rank
        assert len(groups) == (0 if ep_size == 1 else 2 if case.dispatch == "two_level" else 1)
    layer = make_layer(case, ep_rank, ep_size, groups)
    x, upstream, keys = (t.split(case.tokens)[rank] for t in global_tokens(case))
    x = x.to(case.dtype)[None].requires_grad_()  # one sequence
    y, sums = layer(x, context_of(keys[None]))
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters.values()], upstream.to(case.dtype)[None])
    names = {"router.gate.weight": "gate", "router.noise.weight": "noise"}
    names |= {"experts.gate_up": "gate_up", "experts.down": "down"}
    result = {"y": y.detach()[0], "x": grads[0][0], "counts": sums.counts}
    return result | {names[name]: grad for name, grad in zip(parameters, grads[1:], strict=True)}


def slow_layer(case: Case) -> dict[str, Tensor]:
    """The same of all tokens, by definition."""
    weights = {name: weight.requires_grad_() for name, weight in global_weights(case).items()}
    slow = SlowMoE(
        weights["gate"],
        weights["noise"] if case.noisy else None,
        weights["gate_up"],
        weights["down"],
        case.top_k,
        case.top_k > 1,
    )
    x, upstream, keys = global_tokens(case)
    x.requires_grad_()
    y = slow(x, keys, LAYER_KEY)
    wanted = {"x": x} | {name: weight for name, weight in weights.items() if case.noisy or name != "noise"}
    grads = torch.autograd.grad(y, list(wanted.values()), upstream, allow_unused=True, materialize_grads=True)
    logits = slow.logits(x, keys, LAYER_KEY)
    chosen = torch.tensor([slow.choose(row) for row in logits])
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    return {"y": y.detach(), "counts": counts} | dict(zip(wanted, grads, strict=True))


def check(case: Case, results: list[dict[str, Tensor]], ep_size: int) -> None:
    expected = slow_layer(case)
    # fp64: rounding of sums of some dozen terms. fp32: the same with 6e-8 in place of 1e-16; the experts' gradients
    # are sums over up to 50 rows, and the logits reach 90 in the forced cases.
    close = {"rtol": 1e-10, "atol": 1e-11} if case.dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}

    def compare(actual: Tensor, name: str) -> None:
        torch.testing.assert_close(actual.double(), expected[name], **close, msg=lambda text: f"{name}: {text}")

    for name in ("y", "x"):
        compare(torch.cat([result[name] for result in results]), name)
    for name in ("gate", "noise") if case.noisy else ("gate",):  # replicated: every rank has its tokens' part
        compare(sum(result[name] for result in results), name)
    for name in ("gate_up", "down"):  # of every group, all experts' gradients for the group's tokens
        groups = [results[i : i + ep_size] for i in range(0, len(results), ep_size)]
        compare(sum(torch.cat([result[name] for result in group]) for group in groups), name)
    assert torch.equal(sum(result["counts"] for result in results), expected["counts"])
    assert expected["y"].abs().max() > 0.1


CASES = [
    *(pytest.param(Case(bias, top_k=top_k), id=f"{bias}, K={top_k}") for bias in BIASES for top_k in (1, 2)),
    pytest.param(Case(tokens=tuple(EVEN)), id="even"),
    pytest.param(Case(tokens=tuple(MINIMAL)), id="ranks with one token"),
    pytest.param(Case(tokens=tuple(EMPTY)), id="ranks without token"),
    pytest.param(Case(noisy=True), id="noise"),
    pytest.param(Case("experts without token", top_k=1, noisy=True), id="noise, K=1"),
    pytest.param(Case(dtype=torch.float32), id="fp32"),
    pytest.param(Case("all on one", dtype=torch.float32, top_k=1), id="fp32, all on one"),
    pytest.param(Case("experts without token", tuple(EMPTY), dtype=torch.float32), id="fp32, none"),
]


def for_world(case: Case, world_size: int) -> Case:
    """The case with the tokens of that many ranks; fewer ranks have those of the others too."""
    tokens = [sum(case.tokens[rank::world_size]) for rank in range(world_size)]
    return replace(case, tokens=tuple(tokens))


@pytest.mark.parametrize("case", CASES)
def test_one_process(case):
    case = for_world(case, 1)
    check(case, [run_layer(0, 1, case, 1)], 1)


@pytest.mark.parametrize(("dispatch", "num_chunks"), [("flat", 1), ("unique", 3)])
@pytest.mark.parametrize("case", [*CASES, pytest.param(Case(top_k=5), id="K=5")])
def test_two_ranks(case, dispatch, num_chunks, pool2):
    case = replace(for_world(case, 2), dispatch=dispatch, num_chunks=num_chunks)
    check(case, pool2.run(run_layer, case, 2, timeout=60), 2)


@pytest.mark.parametrize(("dispatch", "num_chunks"), [("flat", 3), ("unique", 1), ("two_level", 1), ("two_level", 3)])
@pytest.mark.parametrize("case", [*CASES, pytest.param(Case(top_k=5), id="K=5")])
def test_four_ranks(case, dispatch, num_chunks, pool4):
    case = replace(case, dispatch=dispatch, num_chunks=num_chunks)
    check(case, pool4.run(run_layer, case, 4, timeout=60), 4)


@pytest.mark.parametrize("dispatch", ["flat", "unique"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_and_four_groups_of_ranks(ep_size, dispatch, pool4):
    """Ranks that hold the same experts have gradients of their own group's tokens only."""
    case = Case(dispatch=dispatch, num_chunks=2)
    results = pool4.run(run_layer, case, ep_size, timeout=60)
    check(case, results, ep_size)
    assert not torch.equal(results[0]["down"], results[ep_size]["down"])


def test_cases_are_what_they_say():
    counts = {bias: slow_layer(Case(bias, top_k=1))["counts"] for bias in BIASES}
    assert (counts["random"] > 0).sum() >= 4
    assert not counts["experts without token"][[1, 3, 6, 7]].any()
    assert not counts["only rank 0's experts"][2:].any()
    assert counts["all on one"].tolist() == [0] * 6 + [sum(UNEVEN), 0]
    both = slow_layer(Case("all on one"))["counts"]
    assert both.tolist() == [0] * 6 + [sum(UNEVEN)] * 2


@pytest.mark.parametrize("top_k", [2, EXPERTS])
def test_identical_experts_are_the_dense_layer(top_k):
    layer = make_layer(Case(top_k=top_k), 0, 1, ())
    layer.experts.gate_up.data = layer.experts.gate_up.data[:1].repeat(EXPERTS, 1, 1)
    layer.experts.down.data = layer.experts.down.data[:1].repeat(EXPERTS, 1, 1)
    dense = SwiGLU(HIDDEN, INNER, 0.02, 0.02).double()
    dense.gate_up.weight.data = layer.experts.gate_up.data[0].T.contiguous()
    dense.down.weight.data = layer.experts.down.data[0].T.contiguous()
    x, _, keys = global_tokens(Case())
    y, _ = layer(x[None], context_of(keys[None]))
    torch.testing.assert_close(y[0], dense(x), rtol=0, atol=1e-12)  # fp64; gates add up to one within rounding


def test_relabelling_experts_changes_no_output():
    layer = make_layer(Case(noisy=True), 0, 1, ()).eval()
    x, _, keys = global_tokens(Case())
    y, sums = layer(x[None], context_of(keys[None]))
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    for parameter in layer.parameters():
        parameter.data = parameter.data[order]
    relabelled, relabelled_sums = layer(x[None], context_of(keys[None]))
    torch.testing.assert_close(relabelled, y, rtol=0, atol=1e-12)  # fp64
    assert torch.equal(relabelled_sums.counts, sums.counts[order])
    torch.testing.assert_close(relabelled_sums.importance, sums.importance[order], rtol=0, atol=1e-12)


def test_a_tokens_output_does_not_depend_on_the_other_tokens():
    """Dropless: no capacity to compete for."""
    layer = make_layer(Case(noisy=True), 0, 1, ())
    x, _, keys = global_tokens(Case())
    whole, _ = layer(x[None], context_of(keys[None]))
    batched, _ = layer(x[:8].view(4, 2, HIDDEN), context_of(keys[:8].view(4, 2)))
    alone, _ = layer(x[None, 3:4], context_of(keys[None, 3:4]))
    assert batched.shape == (4, 2, HIDDEN)
    torch.testing.assert_close(batched.view(8, HIDDEN), whole[0, :8], rtol=0, atol=1e-12)  # fp64
    torch.testing.assert_close(alone[0, 0], whole[0, 3], rtol=0, atol=1e-12)
