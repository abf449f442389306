"""Speculative decoding: the target's own text or its exact distribution, whatever the draft proposes."""

from itertools import islice, product

import pytest
import torch

from moe_train.infer.decode import DecodePlan, Decoder
from moe_train.infer.draft import first_layers
from moe_train.infer.sampling import Sampling, distribution
from moe_train.infer.speculative import Draft, SpeculativeDecoder
from moe_train.model.decode_state import Cache
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
