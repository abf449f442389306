"""The mixer interface: what arrives at a mixer, and what layers share."""

from dataclasses import replace

import pytest
import torch

from moe_train.model.decode_state import CacheSpec, RecurrentState, StateGroup
from moe_train.model.mixers import base, infini, ttt
from moe_train.model.mixers.base import Mixer, MixerContext
from moe_train.model.token_index import TokenIndex, document_offsets
from moe_train.model.transformer import Tokens
from tests.model.small import random_ids, small_config, small_model, tokens_of

LENGTH = 11


class Watching(Mixer):
    """Notes what it sees, and hands up a tensor under its layer's number."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x_BSD, context):
        self.seen.append(context)
        return torch.zeros_like(x_BSD), context.shared | {f"of layer {context.layer}": x_BSD.sum(-1)}


def watched(recompute="none"):
    model = small_model(small_config(num_layers=4, moe_every=2), recompute=recompute)
    for block in model.blocks:
        block.mixer = Watching()
    return model


def test_every_part_of_the_context_arrives():
    model, ids = watched(), random_ids(2, LENGTH)
    documents = torch.arange(LENGTH).div(4, rounding_mode="floor").expand(2, LENGTH)
    model(tokens_of(ids, documents_BS=documents, step=3))
    contexts = [block.mixer.seen[0] for block in model.blocks]
    assert [context.layer for context in contexts] == [0, 1, 2, 3]
    for layer, context in enumerate(contexts):
        tokens = context.tokens
        assert tokens.positions_BS.tolist() == [list(range(LENGTH))] and tokens.first_position == 0
        assert torch.equal(tokens.documents_BS, documents)
        assert tokens.offsets_BS.tolist() == [[0, 1, 2, 3] * 2 + [0, 1, 2]] * 2
        assert tokens.keys_BS.shape == ids.shape and tokens.copies is None
        assert context.state is None
        assert list(context.shared) == [f"of layer {below}" for below in range(layer)]
    assert contexts[3].shared["of layer 0"] is contexts[1].shared["of layer 0"]  # handed on as it is


@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_recomputation_knows_no_name(recompute):
    model, ids = watched(recompute), random_ids(2, LENGTH)
    model(tokens_of(ids)).logits_BSV.sum().backward()
    assert all(len(block.mixer.seen) == 2 for block in model.blocks)
    for first, second in (block.mixer.seen for block in model.blocks):
        assert list(first.shared) == list(second.shared)
        assert all(torch.equal(first.shared[name], second.shared[name]) for name in first.shared)


def test_positions_decide_what_is_seen_and_not_the_place_in_the_row():
    """Without documents too: tokens in another order, or twice, are seen by their positions."""
    model, ids = small_model(small_config(kv_layers=2)).eval(), random_ids(1, LENGTH)
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(tokens_of(ids)).logits_BSV
        for shuffled in (order, torch.arange(LENGTH).flip(0)):
            found = model(tokens_of(ids[:, shuffled], positions_BS=shuffled[None])).logits_BSV
            torch.testing.assert_close(found, plain[:, shuffled], rtol=0, atol=1e-12)
        twice = torch.arange(LENGTH).repeat_interleave(2)
        found = model(tokens_of(ids[:, twice], positions_BS=twice[None])).logits_BSV
    torch.testing.assert_close(found, plain[:, twice], rtol=0, atol=1e-12)


def test_token_keys_are_of_step_sequence_and_position():
    def keys(sequences, step, positions=None, first_position=0):
        model = watched()
        ids = random_ids(len(sequences), 4)
        tokens = tokens_of(ids, step=step, positions_BS=positions, first_position=first_position)
        model(replace(tokens, sequences_B=torch.tensor(sequences)))
        return model.blocks[2].mixer.seen[0].tokens.keys_BS

    first = keys([7, 9], 0)
    assert len(torch.cat([first, keys([7, 9], 1), keys([8, 10], 0)]).unique()) == 6 * 4
    assert torch.equal(keys([9], 0), first[1:])  # whichever place in which batch
    for moved in (keys([7, 9], 0, torch.tensor([[2, 3, 4, 5]])), keys([7, 9], 0, first_position=2)):
        assert torch.equal(moved[:, :2], first[:, 2:])


def test_offsets_begin_anew_with_every_document():
    documents = torch.tensor([[7, 7, 7, 2, 2, 9], [0, 0, 1, 1, 0, 0], [5, 5, 5, 5, 5, 5]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert document_offsets(documents).tolist() == expected


def test_angles_are_formed_once_for_all_layers_and_anew_for_other_positions(monkeypatch):
    calls = []
    original = base.rotary_angles
    monkeypatch.setattr(base, "rotary_angles", lambda *args: calls.append(args) or original(*args))
    model = small_model(small_config(kv_layers=2))
    model(tokens_of(random_ids(2, LENGTH)))
    assert len(calls) == 1
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    first = MixerContext(0, TokenIndex(torch.tensor([[0, 1]]), zeros, None, zeros))
    cos, _ = first.rotary_angles(4, 100.0)
    assert first.rotary_angles(4, 100.0)[0] is cos
    assert first.rotary_angles(8, 100.0)[0].shape[-1] == 4
    moved = replace(first, tokens=replace(first.tokens, positions_BS=torch.tensor([[5, 6]])))
    torch.testing.assert_close(
        moved.rotary_angles(4, 100.0)[0], original(moved.tokens.positions_BS, 4, 100.0)[0], rtol=0, atol=0
    )
    assert not torch.equal(moved.rotary_angles(4, 100.0)[0], cos)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"mixer": "ttt_linear", "ttt_linear": {"mini_batch": 4}}, 1),
        ({"mixer": "infini", "infini": {"segment_length": 4}}, 2),  # of keys, and of fewer queries
    ],
    ids=["ttt_linear", "infini"],
)
def test_blocks_of_new_tokens_are_formed_once_for_all_layers(monkeypatch, changes, kinds):
    calls = []
    original = base.align
    monkeypatch.setattr(
        base, "align", lambda *args, **named: calls.append(named["num_blocks"]) or original(*args, **named)
    )
    for mixer in (ttt, infini):
        monkeypatch.setattr(mixer, "align", None)  # no layer forms its own
    model, ids, documents = small_model(small_config(**changes)).eval(), random_ids(2, 8), torch.zeros(2, 8).long()
    for marks, known in ((None, (1, 2)), (documents, (None, None))):
        calls.clear()
        cache = model.new_cache(2, 8)
        with torch.no_grad():
            for span, first in ((slice(0, 3), 0), (slice(3, 6), 3)):
                own = None if marks is None else marks[:, span]
                place = torch.arange(first, first + 3)[None]
                at = {} if marks is None else {"positions_BS": place, "offsets_BS": place, "documents_BS": own}
                model(tokens_of(ids[:, span], **(at or {"first_position": first})), cache)
        # Where the host knows the places of the tokens, it knows the number of blocks: offsets 0 to 2, and 3 to 5.
        assert calls == [number for number in known for _ in range(kinds)]


def test_recurrent_states_count_their_bytes_and_a_group_those_of_its_own():
    def advance(tensors, new, valid_BS):
        return {"total": tensors["total"] + new["x"].sum(1)}, None

    def state(size):
        return RecurrentState({"total": torch.zeros(2, size)}, advance)

    group = StateGroup(near=state(3), far=state(5))
    assert group.nbytes == 2 * (3 + 5) * 4
    mark = group.snapshot()
    group["near"].append({"x": torch.ones(2, 4, 3)})
    assert group["near"].tensors["total"].tolist() == [[4.0] * 3] * 2
    group.restore(mark)
    assert group["near"].tensors["total"].abs().max() == 0


def test_a_mixer_that_remembers_nothing_has_no_state():
    assert Watching().new_state(CacheSpec(1, 2, torch.float32, torch.device("cpu"))) is None
    ids = random_ids(1, 4)
    with torch.no_grad():
        watched().eval()(Tokens(ids, torch.tensor([0])), watched().new_cache(1, 4))
