"""Speculative decoding: the target's own text or its exact distribution, whatever the draft proposes."""

from itertools import product

import pytest
import torch

from moe_train.infer.decode import DecodePlan, Decoder
from moe_train.infer.draft import first_layers
from moe_train.infer.sampling import Sampling, distribution
from moe_train.infer.speculative import Draft, SpeculativeDecoder
from moe_train.model.decode_state import RecurrentState, StateGroup
from moe_train.model.mixers.hidden_keys import CopiesState
from moe_train.model.transformer import Tokens
from tests.infer.test_decode import KINDS, PROMPTS, continued, kinds
from tests.model.small import VOCAB, small_config, small_model

STEPS = 9


def model_of(seed=0, **changes):
    return small_model(small_config(**changes), seed=seed).eval()


def agreeing_draft(changes, seed=0):
    """A draft whose weights are the target's with noise: it is right often, and wrong often."""
    draft, generator = model_of(seed, **changes), torch.Generator().manual_seed(5)
    for parameter in draft.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.1 * parameter.data.std(correction=0) * noise
    return draft


def speculated(decoder, steps=STEPS):
    """Tokens of every row, once all have all of theirs."""
    texts = None
    for new in decoder:
        texts = new if texts is None else [text + more for text, more in zip(texts, new, strict=True)]
        if min(map(len, texts)) == steps:
            return texts


def decoder_of(target, draft, prompts=PROMPTS, steps=STEPS, **settings):
    return SpeculativeDecoder(target, draft, prompts, DecodePlan(steps, VOCAB, **settings))


@kinds
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_greedy_text_is_the_targets(changes, number):
    target = model_of(**changes)
    expected = continued(target, PROMPTS, STEPS)
    decoder = decoder_of(target, Draft(agreeing_draft(changes), number))
    assert speculated(decoder) == expected
    assert 0 < decoder.sums.accepted < decoder.sums.examined  # both happened


@kinds
def test_greedy_text_is_the_targets_with_its_own_first_layers_as_draft(changes):
    config = small_config(**changes)
    target = small_model(config).eval()
    # With hidden copies, two layers may choose as all of them do: then nothing would be taken back.
    num_layers = 1 if "hidden_copies" in changes else 2
    decoder = decoder_of(target, Draft(first_layers(target, num_layers), 3, shares_cache=True))
    before = decoder.cache.nbytes
    assert speculated(decoder) == continued(target, PROMPTS, STEPS)
    assert decoder.cache.nbytes == before and decoder.sums.draft_cache_bytes == 0
    assert decoder.sums.accepted < decoder.sums.examined


DRAFTS = {
    "attention": {"num_layers": 1, "moe_every": 0, "moe": {}},
    "rwkv7": {"num_layers": 1, "mixer": "rwkv7", "moe_every": 0, "moe": {}, "feed_forward": "rwkv7_channel_mix"},
    "ttt": {"num_layers": 2, "mixer": "ttt_linear", "ttt_linear": {"mini_batch": 3}},
    "infini": {"num_layers": 1, "mixer": "infini", "infini": {"segment_length": 4}, "moe_every": 0, "moe": {}},
    "window": {"num_layers": 2, "sliding_window": 2},
}


@pytest.mark.parametrize("of_draft", DRAFTS.values(), ids=DRAFTS)
@pytest.mark.parametrize("kind", ["MLKV", "hybrid"])
def test_a_draft_of_any_other_kind(kind, of_draft):
    target, draft = model_of(**KINDS[kind]), model_of(seed=1, **of_draft)
    decoder = decoder_of(target, Draft(draft, 3), sampling=Sampling(1.5, seed=2))
    alone = [
        speculated(decoder_of(target, Draft(draft, 3), [prompt], sampling=Sampling(1.5, seed=2), first_sequence=row))[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert speculated(decoder) == alone  # the texts depend on neither batch nor padding
    assert 0 < decoder.sums.accepted < decoder.sums.examined
    assert speculated(decoder_of(target, Draft(draft, 3))) == continued(target, PROMPTS, STEPS)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, seed=3)], ids=["greedy", "sampled"])
def test_the_target_as_its_own_draft_is_never_rejected(sampling):
    target = model_of(num_kv_heads=2, kv_layers=2)
    decoder = decoder_of(target, Draft(target, 3), steps=13, sampling=sampling)
    assert [len(text) for text in speculated(decoder, 13)] == [13] * 4
    assert decoder.sums.acceptance == 1 and decoder.sums.tokens_per_round == 4
    assert decoder.sums.rounds == 4 * 3  # one token, then four per round


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 9, 0.9, seed=3)], ids=["greedy", "sampled"])
def test_without_proposed_tokens_it_is_plain_decoding(sampling):
    target = model_of(sliding_window=3)
    decoder = decoder_of(target, Draft(model_of(seed=1), 0), sampling=sampling)
    assert speculated(decoder) == continued(target, PROMPTS, STEPS, sampling=sampling)
    assert decoder.sums.tokens_per_round == 1 and decoder.sums.acceptance == 0


def test_a_draft_that_prefers_what_the_target_shuns():
    target, draft = model_of(), model_of()
    draft.head.weight.data.neg_()
    decoder = decoder_of(target, Draft(draft, 4))
    assert speculated(decoder) == continued(target, PROMPTS, STEPS)
    assert decoder.sums.accepted == 0


@pytest.mark.parametrize("of_draft", [None, 10], ids=["one document", "documents"])
def test_isolated_documents_of_the_target_and_not_of_the_draft_and_both(of_draft):
    mark = 10
    target = model_of(isolate_documents=True)
    prompts = [[4, 5, mark, 3, 1], [mark, 2], [8, mark, mark, 6, 7, 1]]
    expected = continued(target, prompts, STEPS, end_of_document=mark)
    assert any(mark in text for text in expected) and expected != continued(target, prompts, STEPS)
    draft = Draft(agreeing_draft({"isolate_documents": True}), 3, of_draft)
    assert speculated(decoder_of(target, draft, prompts, end_of_document=mark)) == expected


def remembered(state, row):
    """What a state holds of a row: of keys and values those that a query can reach."""
    if isinstance(state, StateGroup):
        return [tensor for part in state.states.values() for tensor in remembered(part, row)]
    if isinstance(state, RecurrentState):
        return [tensor[row].clone() for tensor in state.tensors.values()]
    if isinstance(state, CopiesState):
        parts = [part for part in (state.originals, state.hidden) if part is not None]
        return [tensor for part in parts for tensor in remembered(part, row)]
    positions_C = state._positions_BC[row]
    is_held_C = (positions_C < torch.iinfo(torch.int64).max) & (state._documents_BC[row] >= 0)
    return [x_BGCd[row][:, is_held_C] for x_BGCd in (state._k_BGCd, state._v_BGCd)] + [positions_C[is_held_C]]


def rows_of(cache):
    layers = [states for layer in cache.layers_with_state for states in cache.layer(layer).all]
    return [[tensor for state in layers for tensor in remembered(state, row)] for row in range(len(PROMPTS))]


@kinds
def test_states_after_rounds_are_those_of_plain_decoding(changes):
    target = model_of(**changes)
    plain, after = Decoder(target, PROMPTS, DecodePlan(STEPS, VOCAB)), []
    for _ in plain:
        after.append(rows_of(plain.cache))  # the token that came is not yet read
    decoder = decoder_of(target, Draft(agreeing_draft(changes), 3))
    texts, lengths = [[] for _ in PROMPTS], set()
    for new in decoder:
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        lengths |= {len(text) for text in texts}
        for row, (text, found) in enumerate(zip(texts, rows_of(decoder.cache), strict=True)):
            for ours, theirs in zip(found, after[len(text) - 1][row], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        if min(map(len, texts)) == STEPS:
            break
    assert len(lengths) > 3


# Sequences of 3 new tokens of 8: all 512 can be counted.
FEW, DRAWN, TEXTS = 8, 3, 20_000
EXACT = {
    "attention": ({}, Sampling(1.3, seed=1), 2),
    "three at once": ({"kv_layers": 1}, Sampling(1.0, top_k=6, seed=2), 3),
    "fixed states": ({"mixers": ["ttt_linear", "rwkv4"]}, Sampling(1.1, top_p=0.95, seed=3), 2),
}


def enumerated(model, prompt, sampling):
    """The probability of every sequence of new tokens, from full forward passes."""
    sequences = torch.tensor(list(product(range(FEW), repeat=DRAWN)))
    ids = torch.cat((torch.tensor([prompt]).expand(len(sequences), -1), sequences), dim=1)
    with torch.no_grad():
        logits = model(Tokens(ids, torch.zeros(len(ids), dtype=torch.int64))).logits_BSV[:, len(prompt) - 1 : -1, :FEW]
    p = distribution(logits.flatten(0, 1), sampling).view(len(ids), DRAWN, FEW)
    return p.gather(2, sequences.unsqueeze(2)).squeeze(2).prod(1)


def chance(counts, probabilities):
    """The chance of a chi-square as large as that of the counts; cells of fewer than 5 expected texts are joined."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare]), (counts[rare].sum()[None], expected[rare].sum()[None])]
    found, wanted = (torch.cat(part).double() for part in zip(*cells, strict=True))
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    square = ((found - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), square / 2))


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "sampling", "number"), EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_sampled_texts_have_exactly_the_targets_distribution(changes, sampling, number, is_reversed):
    target, draft = (model_of(seed=seed, num_layers=2, moe_every=2, **changes) for seed in (0, 1))
    if is_reversed:
        draft = model_of(num_layers=2, moe_every=2, **changes)
        draft.head.weight.data.neg_()
    prompt = [3, 1, 4]
    plan = DecodePlan(DRAWN, FEW, sampling)
    decoder = SpeculativeDecoder(target, Draft(draft, number), [prompt] * TEXTS, plan)
    texts = torch.tensor(speculated(decoder, DRAWN))
    counts = (texts * torch.tensor([FEW**2, FEW, 1])).sum(1).bincount(minlength=FEW**DRAWN)
    probabilities = enumerated(target, prompt, sampling)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    assert int(counts[probabilities == 0].sum()) == 0
    assert chance(counts, probabilities) > 1e-3
    # The test can tell: the draft's own distribution, which is a wrong one, is far off.
    assert chance(counts, enumerated(draft, prompt, sampling)) < 1e-12
    assert 0 < decoder.sums.acceptance < 1
