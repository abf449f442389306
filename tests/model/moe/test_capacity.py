"""The MoE layer with a bounded expert: dropped assignments add nothing, each is executed or dropped exactly once."""

from dataclasses import replace

import pytest
import torch

from moe_train.distributed.mesh import create_mesh
from moe_train.model.layers import SwiGLU
from moe_train.model.moe.capacity import NO_LIMIT, CapacityLimit
from moe_train.model.moe.experts import GroupedExperts
from moe_train.model.moe.layer import MoELayer
from moe_train.model.moe.routers.sigmoid_topk import SigmoidTopKRouter
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.ops.keyed_random import combine, make_key
from tests.model.moe.dispatchers import make_dispatcher
from tests.model.small import context_of
from tests.ops.test_capacity import slowly_kept

HIDDEN, INNER, EXPERTS, TOP_K = 6, 5, 4, 2
SEQUENCES, LENGTH = 8, 6
SCALING = 2.5


def draw(*shape, seed, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def make_layer(capacity, rank=0, size=1, groups=(), kind="softmax", shared=False, dispatch="flat"):
    """A layer whose weights are the same on every rank that holds them; expert 0 is everybody's favourite."""
    if kind == "softmax":
        router = SoftmaxTopKRouter(HIDDEN, EXPERTS, TOP_K, True, init_std=1.0)
    else:
        router = SigmoidTopKRouter(
            HIDDEN, EXPERTS, TOP_K, True, 1.0, num_groups=2, top_k_groups=1, scaling_factor=SCALING
        )
    local = EXPERTS // size
    here = slice(rank * local, (rank + 1) * local)
    experts = GroupedExperts(HIDDEN, INNER, EXPERTS, local, here.start, 0.02, 0.02)
    router.gate.weight.data = draw(EXPERTS, HIDDEN, seed=1)
    router.gate.weight.data[0, 0] += 2
    experts.gate_up.data = draw(EXPERTS, HIDDEN, 2 * INNER, seed=2)[here]
    experts.down.data = draw(EXPERTS, INNER, HIDDEN, seed=3)[here]
    dense = None
    if shared:
        dense = SwiGLU(HIDDEN, 2 * INNER, 0.02, 0.02).double()
        dense.gate_up.weight.data, dense.down.weight.data = (
            draw(4 * INNER, HIDDEN, seed=8),
            draw(HIDDEN, 2 * INNER, seed=9),
        )
    return MoELayer(router, make_dispatcher(dispatch, groups, 2), experts, capacity or NO_LIMIT, dense)


def inputs():
    x = draw(SEQUENCES, LENGTH, HIDDEN, seed=4)
    x[..., 0] = 1
    keys = combine(make_key("t"), torch.arange(SEQUENCES * LENGTH)).view(SEQUENCES, LENGTH)
    return x, keys, draw(SEQUENCES, LENGTH, HIDDEN, seed=5)


def expected_output(layer, x, keys, capacity, scopes, policy):
    """Every executed assignment by itself. Also the mask of those that are."""
    rows = x.reshape(-1, HIDDEN)
    routing = layer.router(rows, keys.reshape(-1), len(x))
    gates, chosen = routing.gates_TK, routing.experts_TK
    kept = slowly_kept(chosen, gates if policy == "probability" else None, capacity, scopes)
    outputs = []
    for t in range(len(rows)):
        y = torch.zeros(HIDDEN, dtype=torch.float64)
        for k in range(TOP_K):
            if kept[t, k]:
                gate, up = (rows[t] @ layer.experts.gate_up[chosen[t, k]]).split(INNER)
                y = y + gates[t, k] * ((gate * torch.sigmoid(gate) * up) @ layer.experts.down[chosen[t, k]])
        outputs.append(y)
    return torch.stack(outputs).view_as(x), kept, chosen


def outcome(layer, x, keys, upstream):
    """Output, sums and gradients by name."""
    x = x.clone().requires_grad_()
    y, sums = layer(x, context_of(keys))
    names = [name for name, _ in layer.named_parameters()]
    grads = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    return y.detach(), sums, dict(zip(["x", *names], grads, strict=True))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize(("per_sequence", "factor"), [(True, 1.0), (True, 0.2), (False, 0.75)])
def test_against_a_loop_with_gradients(kind, policy, per_sequence, factor):
    layer = make_layer(CapacityLimit(factor, None, per_sequence, policy), kind=kind)
    x, keys, upstream = inputs()
    scopes = SEQUENCES if per_sequence else 1
    tokens = SEQUENCES * LENGTH // scopes
    capacity = -(-tokens * TOP_K * int(factor * 100) // (EXPERTS * 100))
    y, sums, grads = outcome(layer, x, keys, upstream)
    leaf = x.clone().requires_grad_()
    expected, kept, chosen = expected_output(layer, leaf, keys, capacity, scopes, policy)
    assert 0.05 < kept.double().mean() < 0.95
    close = {"rtol": 1e-10, "atol": 1e-12}  # fp64, sums of some dozen terms
    torch.testing.assert_close(y, expected.detach(), **close)
    wanted = torch.autograd.grad(expected, [leaf, *layer.parameters()], upstream)
    for (name, grad), other in zip(grads.items(), wanted, strict=True):
        torch.testing.assert_close(grad, other, **close, msg=name)
    dropped = [int(((chosen == i) & ~kept).sum()) for i in range(EXPERTS)]
    assert sums.dropped.tolist() == dropped
    assert sums.counts.sum() == SEQUENCES * LENGTH * TOP_K  # dropped ones included
    assert sums.rows == kept.sum()  # each is executed or dropped, exactly once


@pytest.mark.parametrize("factor", [EXPERTS / TOP_K, 100.0])
def test_capacity_of_all_tokens_is_dropless(factor):
    x, keys, upstream = inputs()
    plain, limited = (outcome(make_layer(limit), x, keys, upstream) for limit in (None, CapacityLimit(factor)))
    assert torch.equal(plain[0], limited[0])
    for ours, theirs in zip(plain[1].tensors, limited[1].tensors, strict=True):
        assert torch.equal(ours, theirs)
    for name, grad in plain[2].items():
        assert torch.equal(grad, limited[2][name]), name


def test_evaluation_has_a_factor_of_its_own():
    x, keys, _ = inputs()
    limits = {(None, 0.5): (0, 1), (0.5, None): (1, 0), (0.5, 0.25): (1, 1)}
    for (factor, eval_factor), (in_training, in_evaluation) in limits.items():
        layer = make_layer(CapacityLimit(factor, eval_factor))
        dropped = [int(layer.train(mode)(x, context_of(keys))[1].dropped.sum()) for mode in (True, False)]
        assert [number > 0 for number in dropped] == [bool(in_training), bool(in_evaluation)]
    assert dropped[1] > dropped[0]


def test_a_token_alone_is_never_dropped():
    """So that decoding one token at a time needs no exception."""
    layer = make_layer(CapacityLimit(0.01, 0.01))
    x, keys, _ = inputs()
    _, sums = layer(x[:, :1], context_of(keys[:, :1]))
    assert sums.dropped.sum() == 0


def test_shared_experts_are_added():
    x, keys, _ = inputs()
    plain, shared = make_layer(None), make_layer(None, shared=True)
    expected = plain(x, context_of(keys))[0] + shared.shared(x)
    torch.testing.assert_close(shared(x, context_of(keys))[0], expected, rtol=1e-12, atol=1e-12)  # fp64
    # Two experts of width INNER are one of twice the width.
    halves = [SwiGLU(HIDDEN, INNER, 0.02, 0.02).double() for _ in range(2)]
    gate, up = shared.shared.gate_up.weight.data.chunk(2)
    for i, half in enumerate(halves):
        part = slice(i * INNER, (i + 1) * INNER)
        half.gate_up.weight.data = torch.cat((gate[part], up[part]))
        half.down.weight.data = shared.shared.down.weight.data[:, part].clone()
    torch.testing.assert_close(shared.shared(x), halves[0](x) + halves[1](x), rtol=1e-12, atol=1e-12)


def on_rank(rank, world_size, limit, ep_size, kind, dispatch):
    mesh = create_mesh(ep_size, 60, node_size=2 if dispatch == "two_level" else None)
    layer = make_layer(limit, mesh.expert.rank, ep_size, mesh.dispatch_groups, kind, True, dispatch)
    x, keys, upstream = (t.chunk(world_size)[rank] for t in inputs())
    y, sums, grads = outcome(layer, x, keys, upstream)
    return y, sums, grads


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("world_size", "ep_size", "dispatch"), [(2, 2, "flat"), (4, 4, "unique"), (4, 4, "two_level"), (4, 2, "flat")]
)
@pytest.mark.parametrize("policy", ["probability", "position"])
def test_per_sequence_drops_are_the_same_in_every_layout(kind, world_size, ep_size, dispatch, policy, request):
    limit = CapacityLimit(0.75, None, per_sequence=True, policy=policy)
    y, sums, grads = outcome(make_layer(limit, kind=kind, shared=True), *inputs())
    results = request.getfixturevalue(f"pool{world_size}").run(on_rank, limit, ep_size, kind, dispatch, timeout=60)
    close = {"rtol": 1e-10, "atol": 1e-12}  # fp64
    torch.testing.assert_close(torch.cat([result[0] for result in results]), y, **close)
    torch.testing.assert_close(torch.cat([result[2]["x"] for result in results]), grads["x"], **close)
    assert sums.dropped.sum() > 0
    for i, tensor in enumerate(sums.tensors):
        torch.testing.assert_close(sum(result[1].tensors[i] for result in results), tensor, **close)
    for name in ("router.gate.weight", "shared.gate_up.weight", "shared.down.weight"):
        torch.testing.assert_close(sum(result[2][name] for result in results), grads[name], **close)
    for name in ("experts.gate_up", "experts.down"):
        starts = range(0, world_size, ep_size)
        found = sum(torch.cat([results[i + j][2][name] for j in range(ep_size)]) for i in starts)
        torch.testing.assert_close(found, grads[name], **close)


def test_the_limit_of_a_micro_batch_counts_all_its_tokens():
    x, keys, _ = inputs()
    whole = make_layer(CapacityLimit(1.0, None, per_sequence=False))
    by_sequence = make_layer(replace(whole.capacity, per_sequence=True))
    dropped = [int(layer(x, context_of(keys))[1].dropped.sum()) for layer in (whole, by_sequence)]
    assert 0 < dropped[0] < dropped[1]  # unevenness between sequences is no reason to drop


def test_evaluation_counts_every_sequence_for_itself():
    """A batch may be filled up with padding, which must not take the room of what is evaluated."""
    x, keys, _ = inputs()
    layer = make_layer(CapacityLimit(1.0, 1.0, per_sequence=False)).eval()
    whole, _ = layer(x, context_of(keys))
    part, _ = layer(x[:3], context_of(keys[:3]))
    torch.testing.assert_close(part, whole[:3], rtol=0, atol=1e-12)  # fp64
    assert layer(x, context_of(keys))[1].dropped.sum() > 0
