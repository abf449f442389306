"""Models with hidden copies: their originals are the plain model; streaming, packing, recomputing change nothing."""

from dataclasses import replace

import pytest
import torch

from moe_train.model.flops import training_flops_per_token
from moe_train.model.mixers import visibility
from moe_train.model.mixers.base import MixerContext
from moe_train.model.stream.hidden_copies import HiddenCopies
from moe_train.model.transformer import Tokens
from moe_train.ops.keyed_random import combine
from tests.model.mixers import checks
from tests.model.small import VOCAB, random_ids, small_config, small_model, tokens_of

LENGTH = 13
CLOSE = {"rtol": 0, "atol": 1e-12}  # fp64
PHD = {"copies": 2}
SWA = {"copies": 3, "window_positions": 2}
CSWA = {"copies": 2, "window_positions": 3, "chunk": 5}
MODELS = {
    "phd": {"hidden_copies": PHD},
    "phd, 4 copies": {"hidden_copies": {"copies": 4}, "moe_every": 1},
    "swa": {"hidden_copies": SWA},
    "cswa": {"hidden_copies": CSWA},
    "cswa, MLKV, qk norm": {"hidden_copies": CSWA | {"copies": 3}, "kv_layers": 2, "qk_norm": "head"},
    "swa, sliding window": {"hidden_copies": SWA, "sliding_window": 4, "num_kv_heads": 1},
}
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


@models
@pytest.mark.parametrize(
    "check",
    [
        checks.check_causality,
        checks.check_streaming,
        checks.check_going_back,
        checks.check_recomputation,
    ],
)
def test_common_checks(check, changes):
    check(changes, LENGTH)


@models
def test_packed_documents_are_as_alone(changes):
    """Also where the second begins inside of a chunk of the row."""
    checks.check_packing(changes, LENGTH)


def test_one_copy_is_the_plain_model():
    model = small_model(small_config(hidden_copies={"copies": 1}))
    assert model.stream_hook is None and type(model.new_cache(1, 4).layer(0).mixer).__name__ == "KeyValueState"
    tokens = tokens_of(random_ids(2, LENGTH))
    assert torch.equal(model(tokens).logits_BSV, small_model(small_config())(tokens).logits_BSV)


class Originals(HiddenCopies):
    """Lets the originals predict."""

    def contract(self, x_BSD, context):
        return x_BSD[:, : context.tokens.copies.num_originals]


@models
@pytest.mark.parametrize("packed", [False, True])
def test_the_originals_are_the_plain_model_with_its_noise(changes, packed):
    plain = small_model(small_config(**{name: value for name, value in changes.items() if name != "hidden_copies"}))
    model = small_model(small_config(**changes))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    hook = model.stream_hook
    tokens = checks.index_of(random_ids(2, LENGTH), checks.packed_documents(LENGTH) if packed else None)
    with torch.no_grad():
        predicted = model.train()(tokens).logits_BSV
        model.stream_hook = Originals(hook.copies, hook.window, hook.chunk, hook.num_layers)
        found, expected = model(tokens).logits_BSV, plain.train()(tokens).logits_BSV
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (predicted - expected).abs().max() > 1e-3


def test_special_cases():
    """A window of one chunk's positions is none; a chunk as long as the sequence is none."""
    tokens = tokens_of(random_ids(2, LENGTH))

    def logits(**copies):
        with torch.no_grad():
            return small_model(small_config(hidden_copies=copies))(tokens).logits_BSV

    swa = logits(copies=3, window_positions=2)
    assert torch.equal(logits(copies=3, window_positions=2, chunk=LENGTH), swa)
    assert not torch.allclose(logits(copies=3, window_positions=2, chunk=4), swa)
    assert not torch.allclose(logits(copies=3), swa)


def test_every_copy_is_routed_with_a_key_of_its_own():
    model = small_model(small_config(hidden_copies=SWA))
    tokens = model._token_index(tokens_of(random_ids(2, LENGTH)))
    x = torch.randn(2, LENGTH, 16)
    stream, context = model.stream_hook.expand(x, MixerContext(0, tokens))
    assert torch.equal(stream, x.repeat(1, 3, 1))
    keys = context.tokens.keys_BS.unflatten(1, (3, LENGTH)).unbind(1)
    assert torch.equal(keys[0], tokens.keys_BS)
    assert torch.equal(keys[2], combine(tokens.keys_BS, 3)) and len(torch.cat(keys).unique()) == 6 * LENGTH
    sums = model(tokens_of(random_ids(2, LENGTH))).sums
    assert sums.counts.sum(1).tolist() == [2 * 2 * 3 * LENGTH] * 2 and sums.tokens.tolist() == [2 * 3 * LENGTH] * 2


def prefill(model, tokens, chunk):
    """Decode the last half one by one behind a prefill; returns its logits."""
    half = LENGTH // 2 + 1
    cache = model.new_cache(2, LENGTH)
    begin, logits = checks.part_of(tokens, 0, half), []
    begin = replace(begin, hidden_from=tokens.hidden_from)
    for start in range(0, half, chunk):
        part = checks.part_of(begin, start, min(half, start + chunk))
        part = replace(part, hidden_from=max(0, begin.hidden_from - start))
        last = model(part, cache, num_logits=1).logits_BSV
    logits.append(last)
    for place in range(half, LENGTH):
        logits.append(model(checks.part_of(tokens, place, place + 1), cache).logits_BSV)
    return torch.cat(logits, 1)


@models
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_prefill_computes_the_least_hidden_positions(changes, padded):
    model, half = checks.make(changes | {"num_layers": 2, "kv_layers": None}).eval(), LENGTH // 2 + 1
    documents = checks.padded_documents(LENGTH) if padded else None
    tokens = checks.index_of(random_ids(2, LENGTH), documents)
    expected = model(tokens).logits_BSV[:, half - 1 :]
    hook = model.stream_hook
    wanted = model.for_prefill(checks.part_of(tokens, 0, half)).hidden_from
    reach = [min(half - 1 - (2 * row + 1 if padded else 0), 2 * hook.window) for row in range(2)]
    if hook.chunk is not None:
        reach = [min(own, (half - 1 - (2 * row + 1 if padded else 0)) % hook.chunk) for row, own in enumerate(reach)]
    assert wanted == half - 1 - max(reach)
    for chunk in (half, 3, 1):
        found = prefill(model, replace(tokens, hidden_from=wanted), chunk)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    if max(reach) > 0:
        found = prefill(model, replace(tokens, hidden_from=wanted + 1), half)
        assert (found[:, 0] - expected[:, 0]).abs().max() > 1e-6


@pytest.mark.parametrize("changes", [{"hidden_copies": PHD}, MODELS["swa, sliding window"]], ids=["phd", "window"])
@torch.no_grad()
def test_a_prefill_with_documents_forms_no_mask_of_all_pairs(changes, monkeypatch):
    config, length, masks = small_config(**changes, isolate_documents=True), 2 * LENGTH, []
    model = small_model(config)
    tokens = model.for_prefill(checks.index_of(random_ids(2, length), checks.packed_documents(length)))
    whole = model(tokens, cache=model.new_cache(2, length)).logits_BSV
    make = visibility.visible_keys

    def noting(queries, keys, *rest):
        masks.append((queries.shape[1], keys.shape[1]))
        return make(queries, keys, *rest)

    monkeypatch.setattr(visibility, "MOST_QUERIES", 4)
    monkeypatch.setattr(visibility, "visible_keys", noting)
    parts = model(tokens, cache=model.new_cache(2, length)).logits_BSV
    torch.testing.assert_close(parts, whole, **CLOSE)
    hidden = length - (tokens.hidden_from or 0)
    assert masks and all(queries <= max(4, hidden) for queries, _ in masks)


@torch.no_grad()
def test_a_prefill_for_several_logits_begins_earlier():
    model, ids = checks.make({"hidden_copies": CSWA | {"chunk": 100}, "num_layers": 2}).eval(), random_ids(2, LENGTH)
    tokens = model.for_prefill(tokens_of(ids), num_logits=3)
    assert tokens.hidden_from == LENGTH - 3 - 2 * 3
    found = model(tokens, model.new_cache(2, LENGTH), num_logits=3).logits_BSV
    torch.testing.assert_close(found, model(tokens_of(ids)).logits_BSV[:, -3:], rtol=0, atol=1e-10)
    assert model.for_prefill(tokens_of(ids[:, :1])).hidden_from is None


@torch.no_grad()
def test_keeping_tokens_of_which_the_first_have_no_hidden_copies():
    model, ids = checks.make({"hidden_copies": SWA}).eval(), random_ids(2, LENGTH)
    full = model(tokens_of(ids)).logits_BSV
    cache = model.new_cache(2, LENGTH)
    marks = cache.snapshot()
    model(replace(tokens_of(ids[:, :11]), hidden_from=1), cache)  # the first position matters to none from 9 on
    cache.keep(marks, torch.tensor([10, 9]))
    for row, count in enumerate((10, 9)):
        rest = Tokens(ids[:, count : count + 1], torch.arange(2), positions_BS=torch.tensor([[10], [9]]))
        after = cache.snapshot()
        torch.testing.assert_close(model(rest, cache).logits_BSV[row, 0], full[row, count], rtol=0, atol=1e-10)
        cache.restore(after)


@models
def test_the_cache_holds_the_originals_and_a_ring(changes):
    model = small_model(small_config(**changes))
    plain = small_model(small_config(**{name: value for name, value in changes.items() if name != "hidden_copies"}))
    own, config = small_config(**changes).hidden_copies, small_config(**changes)
    ring = 2 * 3 * own.reach * (own.copies - 1) * config.num_kv_heads * 4 * 8  # batch 3, head size 4, fp64
    extra = len(config.kv_owner_layers) * ring
    assert model.new_cache(3, 50).nbytes == plain.new_cache(3, 50).nbytes + extra
    assert (own.reach > 0) == (extra > 0)


def test_flops_are_of_an_original_token():
    """The vocabulary's head passes one copy; scores are counted by who sees whom."""

    def flops(**copies):
        return training_flops_per_token(small_config(hidden_copies=copies, moe_every=0, moe={}), VOCAB, LENGTH)

    head, plain = 6 * 16 * VOCAB, flops(copies=1)
    score = 3 * 4 * 4 * 4 * 4  # of one key, in 4 layers of 4 heads of 4
    assert flops(copies=2) == pytest.approx(2 * (plain - head) + head + score)  # and its own key
    assert flops(copies=3) == pytest.approx(3 * (plain - head) + head + score * 3)
    reach = sum(min(p % 5, 3) for p in range(LENGTH)) / LENGTH
    assert flops(**CSWA) == pytest.approx(2 * (plain - head) + head + score * (1 + reach))
    reach = sum(min(p, 2) for p in range(LENGTH)) / LENGTH
    assert flops(**SWA) == pytest.approx(3 * (plain - head) + head + score * (3 + 4 * reach))
