"""Infini-attention: its limits, where it is attention or linear attention, and its memory over segments."""

import pytest
import torch
import torch.nn.functional as F

from moe_train.model.decode_state import CacheSpec
from moe_train.model.mixers.base import MixerContext
from tests.model.mixers import checks
from tests.model.small import random_ids

LENGTH = 9
CLOSE = {"rtol": 0, "atol": 1e-12}


def layer_of(segment, memory="linear", beta=None):
    model = checks.make({"mixer": "infini", "infini": {"segment_length": segment, "memory": memory}})
    mixer = model.blocks[0].mixer
    if beta is not None:
        mixer.beta.data.fill_(beta)
    context = MixerContext(0, model._token_index(checks.index_of(random_ids(1, LENGTH), None)))
    x = torch.randn(1, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return mixer, context, x


def test_a_single_segment_is_attention_behind_the_gate():
    mixer, context, x = layer_of(LENGTH)
    attention = checks.make({}).blocks[0].mixer
    projections = {name: value for name, value in mixer.state_dict().items() if name != "beta"}
    attention.load_state_dict(projections)  # all that attention has
    found, expected = mixer(x, context)[0], attention(x, context)[0]
    assert mixer.beta.abs().max() > 0.1 and not torch.allclose(found, expected)
    # The output projection is linear: scaling heads scales the columns that it reads.
    gates = (1 - mixer.beta.sigmoid()).repeat_interleave(mixer.head_dim)
    mixer.output.weight.data /= gates
    torch.testing.assert_close(mixer(x, context)[0], expected, **CLOSE)


def test_without_the_memory_segments_do_not_see_each_other():
    mixer, context, x = layer_of(4, beta=-1e3)
    changed = x.clone()
    changed[:, :4] += 1
    before, after = mixer(x, context)[0], mixer(changed, context)[0]
    assert torch.equal(before[:, 4:], after[:, 4:]) and not torch.allclose(before[:, :4], after[:, :4])


def test_segments_of_one_token_are_strictly_causal_linear_attention():
    mixer, context, x = layer_of(1, beta=1e3)
    q, k, v = (project(x)[0].unflatten(-1, (-1, 4)) for project in (mixer.query, mixer.key, mixer.value))
    k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))  # 4 query heads on 2 heads of keys
    scores = torch.einsum("ihd,jhd->hij", F.elu(q) + 1, F.elu(k) + 1).tril(-1)
    weights = scores[:, 1:] / scores[:, 1:].sum(-1, keepdim=True)
    expected = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
    found = mixer(x, context)[0][0]
    torch.testing.assert_close(found[1:], mixer.output(expected), **CLOSE)
    assert found[0].abs().max() == 0


def test_the_delta_rule_writes_a_repeated_pair_once():
    mixer, context, _ = layer_of(1, "delta")
    x = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 3, 16)
    state = mixer.new_state(CacheSpec(1, LENGTH, torch.float64, torch.device("cpu")))
    mixer(x[:, :1], at_place(context, 0, state))
    once = state.tensors["committed_matrix"]
    mixer(x[:, 1:2], at_place(context, 1, state))
    torch.testing.assert_close(state.tensors["committed_matrix"], once, **CLOSE)
    assert once.abs().max() > 0.1


def at_place(context, place, state):
    tokens = context.tokens
    index = type(tokens)(
        tokens.positions_BS[:, place : place + 1],
        tokens.offsets_BS[:, place : place + 1],
        None,
        tokens.keys_BS[:, place : place + 1],
        first_position=place,
    )
    return MixerContext(0, index, state=state)


@pytest.mark.parametrize("memory", ["linear", "delta"])
def test_gradients_flow_through_two_commits(memory):
    mixer, context, x = layer_of(3, memory)
    x.requires_grad_()
    mixer(x, context)[0][:, 6:].square().sum().backward()
    assert (x.grad[:, :3].abs().amax((0, 2)) > 1e-6).all()


def test_the_state_does_not_grow():
    mixer, _, _ = layer_of(4)
    sizes = [mixer.new_state(CacheSpec(2, n, torch.float32, torch.device("cpu"))).nbytes for n in (1024, 16384)]
    assert sizes[0] == sizes[1] == 2 * (2 * 2 * (4 * 4 + 4) + 2 * 2 * 4 * 4) * 4
