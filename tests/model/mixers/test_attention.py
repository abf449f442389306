"""Attention with a reduced cache, in whole models: causality, decoding in any chunks, MLKV, packed documents."""

import pytest
import torch

from moe_train.model.cache import KeyValueState
from tests.model.small import random_ids, small_config, small_model, tokens_of

LENGTH = 11
KINDS = {
    "MHA": {"num_kv_heads": 4},
    "GQA": {"num_kv_heads": 2},
    "MQA": {"num_kv_heads": 1},
    "MLKV": {"num_kv_heads": 2, "kv_layers": 2},
    "MLKV, list of owners": {"num_kv_heads": 4, "kv_layers": [0, 3]},
    "MLKV, one for all": {"num_kv_heads": 1, "kv_layers": 1},
    "GQA, window": {"num_kv_heads": 2, "sliding_window": 4},
    "MLKV, window": {"num_kv_heads": 2, "kv_layers": 2, "sliding_window": 3},
}
EXACT = {"rtol": 0, "atol": 1e-10}  # fp64; chunks change the order of sums
kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


def reach(changes):
    """Tokens from one on that hear of it: all, or a window further with each owner layer, whose keys others share."""
    config = small_config(**changes)
    if config.sliding_window is None:
        return LENGTH
    return len(config.kv_owner_layers) * (config.sliding_window - 1) + 1


@torch.no_grad()
def decode(model, ids, chunks, documents=None, cache=None, start=0):
    """Logits of the sequence fed in chunks."""
    cache = cache if cache is not None else model.new_cache(len(ids), LENGTH)
    logits, place = [], start
    for chunk, part in zip(chunks, ids.split(chunks, dim=1), strict=True):
        span = torch.arange(place, place + chunk)
        part_documents = None if documents is None else documents[:, span - start]
        tokens = tokens_of(part, positions_BS=span[None], documents_BS=part_documents)
        logits.append(model(tokens, cache).logits_BSV)
        place += chunk
    return torch.cat(logits, dim=1)


@kinds
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [6, 1, 1, 1, 1, 1], [3, 4, 1, 3], [1, 10]], ids=str)
def test_decoding_in_any_chunks_equals_the_full_forward(changes, chunks):
    model = small_model(small_config(**changes)).eval()
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        full = model(tokens_of(ids)).logits_BSV
    torch.testing.assert_close(decode(model, ids, chunks), full, **EXACT)
    assert full.std() > 0.1


@kinds
def test_cache_has_the_owners_entries_and_no_other(changes):
    config = small_config(**changes)
    model = small_model(config).eval()
    cache = model.new_cache(3, LENGTH)
    assert cache.owner_layers == config.kv_owner_layers
    assert all(isinstance(cache.state(layer), KeyValueState) for layer in cache.owner_layers)
    batch, owners = 3, len(config.kv_owner_layers)
    kept = min(LENGTH, config.sliding_window or LENGTH)
    expected = 2 * batch * kept * owners * config.attention_kv_heads * config.attention_head_dim * 8
    assert cache.nbytes == expected
    decode(model, random_ids(3, LENGTH), [4, 7], cache=cache)
    assert cache.nbytes == expected


@kinds
def test_restore_takes_back_rejected_tokens(changes):
    model = small_model(small_config(**changes)).eval()
    ids, other = random_ids(2, LENGTH), random_ids(2, LENGTH, seed=1)
    with torch.no_grad():
        full = model(tokens_of(ids)).logits_BSV
    cache = model.new_cache(2, LENGTH)
    decode(model, ids[:, :5], [5], cache=cache)
    marks = cache.snapshot()
    for chunks in ([1, 3], [2, 2]):  # a mark can be used again
        rejected = decode(model, other[:, :4], chunks, cache=cache, start=5)
        assert not torch.allclose(rejected, full[:, 5:9])
        cache.restore(marks)
    torch.testing.assert_close(decode(model, ids[:, 5:], [2, 4], cache=cache, start=5), full[:, 5:], **EXACT)


@kinds
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", [0, 6, LENGTH - 1])
def test_no_token_sees_a_later_one(changes, training, place):
    model = small_model(small_config(**changes)).train(training)
    ids = random_ids(1, LENGTH)
    changed = ids.clone()
    changed[0, place] = (changed[0, place] + 1) % 20
    with torch.no_grad():
        before, after = (model(tokens_of(x)).logits_BSV[0] for x in (ids, changed))
    torch.testing.assert_close(after[:place], before[:place], **EXACT)
    end = place + reach(changes)
    assert ((after[place:end] - before[place:end]).abs().amax(1) > 1e-6).all()
    torch.testing.assert_close(after[end:], before[end:], **EXACT)


@kinds
def test_packed_documents_are_isolated(changes):
    model = small_model(small_config(**changes)).eval()
    ids = random_ids(1, LENGTH)
    documents = torch.tensor([[4] * 5 + [9] * 6])
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 3) % 20
    with torch.no_grad():
        first, second = (model(tokens_of(x, documents_BS=documents)).logits_BSV[0] for x in (ids, changed))
        torch.testing.assert_close(second[5:], first[5:], **EXACT)
        assert ((second[:5] - first[:5]).abs().amax(1) > 1e-6).all()
        open_first, open_second = (model(tokens_of(x)).logits_BSV[0] for x in (ids, changed))
        end = 4 + reach(changes)
        assert ((open_second[5:end] - open_first[5:end]).abs().amax(1) > 1e-6).all()
        alone = model(tokens_of(ids[:, 5:])).logits_BSV[0]
    # Positions count from the document's start there, and cosines are in fp32: 1e-7 a product.
    torch.testing.assert_close(first[5:], alone, rtol=0, atol=1e-5)


@kinds
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [7, 4]], ids=str)
def test_packed_documents_decode_as_they_train(changes, chunks):
    model = small_model(small_config(**changes)).eval()
    ids = random_ids(2, LENGTH)
    documents = torch.tensor([[0] * 3 + [1] * 8, [0] * 9 + [1] * 2])
    with torch.no_grad():
        full = model(tokens_of(ids, documents_BS=documents)).logits_BSV
        assert not torch.allclose(full, model(tokens_of(ids)).logits_BSV)
    torch.testing.assert_close(decode(model, ids, chunks, documents), full, **EXACT)


@pytest.mark.parametrize("given", [4, [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_layer_an_owner_is_the_plain_model_bit_for_bit(given, dtype):
    ids = random_ids(2, LENGTH)
    plain = small_model(small_config(), dtype=dtype)
    shared = small_model(small_config(kv_layers=given), dtype=dtype)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in shared.named_parameters()]
    assert torch.equal(plain(tokens_of(ids)).logits_BSV, shared(tokens_of(ids)).logits_BSV)
    fewer = small_model(small_config(kv_layers=3), dtype=dtype)
    assert not torch.equal(plain(tokens_of(ids)).logits_BSV, fewer(tokens_of(ids)).logits_BSV)


def rms(x, weight, epsilon=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def rotated(x, theta=10000.0):
    """Complex multiplication; x is [S, heads, d]."""
    length, _, size = x.shape
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turned = (
        torch.complex(x[..., : size // 2], x[..., size // 2 :]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat((turned.real, turned.imag), -1)


def slow_logits(model, config, ids):
    """One sequence through the decoder by its definition, dense blocks only."""
    x = model.embedding.weight[ids]
    heads, groups, size = config.num_heads, config.attention_kv_heads, config.attention_head_dim
    length = len(ids)
    keys = values = None
    for layer, block in enumerate(model.blocks):
        h = rms(x, block.mixer_norm.weight)
        if layer in config.kv_owner_layers:  # of the owner's normalised hidden state, shared after the rotation
            keys = rotated((h @ block.mixer.key.weight.T).view(length, groups, size))
            values = (h @ block.mixer.value.weight.T).view(length, groups, size)
        queries = rotated((h @ block.mixer.query.weight.T).view(length, heads, size))
        mixed = []
        for s in range(length):
            for i in range(heads):
                g = i // (heads // groups)
                seen = slice(max(0, s + 1 - (config.sliding_window or length)), s + 1)
                weights = (keys[seen, g] @ queries[s, i] / size**0.5).softmax(0)
                mixed.append(weights @ values[seen, g])
        x = x + torch.stack(mixed).view(length, heads * size) @ block.mixer.output.weight.T
        gate, up = (rms(x, block.feed_forward_norm.weight) @ block.feed_forward.gate_up.weight.T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ block.feed_forward.down.weight.T
    return rms(x, model.final_norm.weight) @ model.head.weight.T


@kinds
def test_model_and_gradients_equal_the_definition(changes):
    """The owner's key and value maps get the gradients of all layers that read them."""
    config = small_config(moe_every=0, moe={}, **changes)
    model = small_model(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.arange(parameter.numel()).cos()
    ids = random_ids(1, 6)
    upstream = torch.randn(6, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(tokens_of(ids)).logits_BSV[0]
    expected = slow_logits(model, config, ids[0])
    grads = torch.autograd.grad(logits, parameters, upstream)
    expected_grads = torch.autograd.grad(expected, parameters, upstream)
    # The model's cosines are in fp32: 1e-7 relative to values of order 10.
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-5)
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad, expected_grad, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert expected_grad.abs().max() > 1e-2, name
