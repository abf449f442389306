"""The mixer interface, driven by a mixer that uses every part of it."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from moe_train.model.decode_state import CacheSpec, KeyValue
from moe_train.model.layers import Linear
from moe_train.model.mixers import base
from moe_train.model.mixers.base import Mixer, MixerContext
from tests.model.small import VOCAB, random_ids, small_config, small_model, tokens_of

LENGTH, HIDDEN = 9, 16
EXACT = {"rtol": 0, "atol": 1e-10}  # fp64; chunks change the order of sums


@dataclass
class Running:
    """A sum over the tokens of the current document so far."""

    total: Tensor
    document: Tensor


class RunningState:
    """The running sum between decoding steps."""

    def __init__(self) -> None:
        self.running: Running | None = None

    def append(self, new: tuple[Tensor, Tensor]) -> Tensor:
        sums, self.running = running_sums(*new, self.running)
        return sums

    def snapshot(self) -> Running | None:
        return self.running

    def restore(self, mark: Running | None) -> None:
        self.running = mark

    @property
    def nbytes(self) -> int:
        return 0 if self.running is None else self.running.total.nbytes


def running_sums(x_BSD: Tensor, documents_BS: Tensor, running: Running | None) -> tuple[Tensor, Running]:
    """At every token the sum over its document so far, going on from `running`."""
    running = running or Running(torch.zeros_like(x_BSD[:, 0]), torch.full_like(documents_BS[:, 0], -1))
    sums = []
    for s in range(x_BSD.shape[1]):
        same = (documents_BS[:, s] == running.document)[:, None]
        running = Running(torch.where(same, running.total, 0) + x_BSD[:, s], documents_BS[:, s])
        sums.append(running.total)
    return torch.stack(sums, 1), running


class SumMixer(Mixer):
    """Layers 0 and 2 publish running sums with positions of their own; every layer mixes by layer, place and key."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.summed = Linear(HIDDEN, HIDDEN, 0.3) if layer in (0, 2) else None
        self.output = Linear(HIDDEN, HIDDEN, 0.3)
        self.seen: list[MixerContext] = []

    def new_state(self, room: CacheSpec) -> RunningState | None:
        return RunningState() if self.summed is not None else None

    def publish(self, x_BSD: Tensor, context: MixerContext) -> KeyValue | None:
        if self.summed is None:
            return super().publish(x_BSD, context)
        documents = context.documents_BS
        if documents is None:
            documents = torch.zeros(x_BSD.shape[:2], dtype=torch.int64)
        new = (self.summed(x_BSD), documents)
        sums = context.state.append(new) if context.state is not None else running_sums(*new, None)[0]
        return KeyValue(sums[:, None], (2 * sums)[:, None], context.positions_BS * 10 + context.layer, documents)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> Tensor:
        self.seen.append(context)
        held = context.key_value
        factor = (context.layer + 1) * torch.cos(held.positions_BC.double()) + context.positions_BS / 10
        draw = (context.token_keys_BS % 1000) / 1000
        return self.output(held.k_BGCd[:, 0] * factor[..., None] + torch.tanh(held.v_BGCd[:, 0]) * draw[..., None])


def make(recompute=False):
    config = small_config(num_layers=4, moe_every=2)
    model = small_model(config, recompute=recompute)
    generator = torch.Generator().manual_seed(5)
    for layer, block in enumerate(model.blocks):
        block.mixer = SumMixer(layer).double()
        for parameter in block.mixer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return model


@torch.no_grad()
def decode(model, ids, chunks, documents, cache, start=0):
    logits, place = [], start
    for chunk, part in zip(chunks, ids.split(chunks, dim=1), strict=True):
        span = torch.arange(place, place + chunk)
        held = None if documents is None else documents[:, span - start]
        logits.append(model(tokens_of(part, positions_BS=span[None], documents_BS=held, step=3), cache).logits_BSV)
        place += chunk
    return torch.cat(logits, dim=1)


def test_every_part_of_the_context_arrives():
    model = make()
    ids, documents = random_ids(2, LENGTH), torch.arange(LENGTH).div(4, rounding_mode="floor").expand(2, LENGTH)
    model(tokens_of(ids, documents_BS=documents, step=3))
    contexts = [block.mixer.seen[0] for block in model.blocks]
    assert [context.layer for context in contexts] == [0, 1, 2, 3]
    for context in contexts:
        assert context.positions_BS.tolist() == [list(range(LENGTH))]
        assert torch.equal(context.documents_BS, documents)
        assert context.state is None
        assert context.token_keys_BS.shape == ids.shape
    published = [context.key_value for context in contexts]
    assert published[1] is published[0]  # handed on as they are
    assert published[3] is published[2]
    assert published[2] is not published[0]
    assert published[3].positions_BC.tolist() == [[10 * s + 2 for s in range(LENGTH)]]


def test_token_keys_are_of_step_sequence_and_position():
    def keys(sequences, step, positions=None):
        model = make()
        ids = random_ids(len(sequences), 4)
        model(replace(tokens_of(ids, step=step, positions_BS=positions), sequences_B=torch.tensor(sequences)))
        return model.blocks[2].mixer.seen[0].token_keys_BS

    first = keys([7, 9], 0)
    assert len(torch.cat([first, keys([7, 9], 1), keys([8, 10], 0)]).unique()) == 6 * 4
    assert torch.equal(keys([9], 0), first[1:])  # whichever place in which batch
    assert torch.equal(keys([7, 9], 0, torch.tensor([[2, 3, 4, 5]]))[:, :2], first[:, 2:])


@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [4, 1, 4], [2, 7]], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_streaming_in_any_chunks_equals_the_full_forward(chunks, packed):
    model = make().eval()
    ids = random_ids(2, LENGTH)
    documents = torch.tensor([[0] * 4 + [1] * 5, [5] * 7 + [6] * 2]) if packed else None
    with torch.no_grad():
        full = model(tokens_of(ids, documents_BS=documents, step=3)).logits_BSV
    cache = model.new_cache(2, LENGTH)
    assert cache.owner_layers == (0, 2)
    torch.testing.assert_close(decode(model, ids, chunks, documents, cache), full, **EXACT)
    assert cache.nbytes == 2 * 2 * HIDDEN * 8
    assert model.blocks[0].mixer.seen[-1].state is cache.state(0)
    assert model.blocks[1].mixer.seen[-1].state is None


def test_snapshot_and_restore():
    model = make().eval()
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        full = model(tokens_of(ids, step=3)).logits_BSV
    cache = model.new_cache(2, LENGTH)
    decode(model, ids[:, :4], [4], None, cache)
    marks = cache.snapshot()
    wrong = decode(model, ids[:, :5].flip(1), [5], None, cache, start=4)
    assert not torch.allclose(wrong, full[:, 4:])
    cache.restore(marks)
    torch.testing.assert_close(decode(model, ids[:, 4:], [2, 3], None, cache, start=4), full[:, 4:], **EXACT)


def test_recomputation_sees_what_was_published():
    """Gradients reach the publishing layer from the layers above; positions are the published ones."""
    ids = random_ids(2, LENGTH)
    upstream = torch.randn(2, LENGTH, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in (False, True):
        model = make(recompute)
        logits = model(tokens_of(ids, step=3)).logits_BSV
        (logits * upstream).sum().backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
        assert all(len(block.mixer.seen) == 1 + recompute for block in model.blocks)
    (plain, grads), (recomputed, recomputed_grads) = results
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    for name, grad in grads.items():
        # fp64; gradients of layers are added in another order.
        torch.testing.assert_close(recomputed_grads[name], grad, rtol=1e-9, atol=1e-10, msg=name)
    assert grads["blocks.0.mixer.summed.weight"].abs().max() > 1e-3


def test_a_mixer_that_publishes_nothing_hands_on_what_it_was_given():
    class Nothing(Mixer):
        def forward(self, x_BSD, context):
            return x_BSD

    mixer, zeros = Nothing(), torch.zeros(1, 2, dtype=torch.int64)
    held = KeyValue(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), zeros, None)
    context = MixerContext(1, zeros, None, zeros, held)
    assert mixer.publish(torch.zeros(1, 2, 4), context) is held
    assert mixer.publish(torch.zeros(1, 2, 4), context.with_key_value(None)) is None
    assert mixer.new_state(CacheSpec(1, 2, torch.float32, torch.device("cpu"))) is None
    assert isinstance(mixer, nn.Module)


def test_angles_are_formed_once_for_all_layers_and_anew_for_other_positions(monkeypatch):
    calls = []
    original = base.rotary_angles
    monkeypatch.setattr(base, "rotary_angles", lambda *args: calls.append(args) or original(*args))
    model = small_model(small_config(kv_layers=2))
    model(tokens_of(random_ids(2, LENGTH)))
    assert len(calls) == 1
    first = MixerContext(0, torch.tensor([[0, 1]]), None, torch.zeros(1, 2, dtype=torch.int64))
    cos, _ = first.rotary_angles(4, 100.0)
    assert first.rotary_angles(4, 100.0)[0] is cos
    assert first.rotary_angles(8, 100.0)[0].shape[-1] == 4
    moved = replace(first, positions_BS=torch.tensor([[5, 6]]))
    torch.testing.assert_close(moved.rotary_angles(4, 100.0)[0], original(moved.positions_BS, 4, 100.0)[0])
    assert not torch.equal(moved.rotary_angles(4, 100.0)[0], cos)
