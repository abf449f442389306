"""Attention with a reduced cache, in whole models: causality, decoding in any chunks, MLKV, packed documents, norms of
queries and keys."""

import pytest
import torch

from moe_train.model.mixers import attention
from moe_train.model.mixers.key_value import KeyValueState
from moe_train.ops.attention import visible_keys
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
    "GQA, norm of heads": {"num_kv_heads": 2, "qk_norm": "head", "norm_epsilon": 1e-2},
    "MHA, norm of projections": {"num_kv_heads": 4, "qk_norm": "projection", "norm_epsilon": 1e-2},
    "MLKV, norm of heads": {"num_kv_heads": 2, "kv_layers": 2, "qk_norm": "head"},
    "MLKV, window, norm of projections": {
        "num_kv_heads": 2,
        "kv_layers": 2,
        "sliding_window": 3,
        "qk_norm": "projection",
    },
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
    assert cache.layers_with_state == config.kv_owner_layers
    assert all(isinstance(cache.layer(layer).mixer, KeyValueState) for layer in cache.layers_with_state)
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


def normed(x, norm, config):
    """Queries or keys before their rotation, head by head or all heads of a token together; x is [S, heads * d]."""
    if config.qk_norm == "none":
        return x
    if config.qk_norm == "projection":
        return torch.stack([rms(token, norm.weight, config.norm_epsilon) for token in x])
    tokens = [[rms(h, norm.weight, config.norm_epsilon) for h in t.split(config.attention_head_dim)] for t in x]
    return torch.stack([torch.cat(heads) for heads in tokens])


def slow_logits(model, config, ids):
    """One sequence through the decoder by its definition, dense blocks only."""
    x = model.embedding.weight[ids]
    heads, groups, size = config.num_heads, config.attention_kv_heads, config.attention_head_dim
    length = len(ids)
    keys = values = None
    for layer, block in enumerate(model.blocks):
        h = rms(x, block.mixer_norm.weight, config.norm_epsilon)
        if layer in config.kv_owner_layers:  # of the owner's normalised hidden state, shared after the rotation
            keys = normed(h @ block.mixer.key.weight.T, block.mixer.key_norm, config)
            keys = rotated(keys.view(length, groups, size))
            values = (h @ block.mixer.value.weight.T).view(length, groups, size)
        queries = normed(h @ block.mixer.query.weight.T, block.mixer.query_norm, config)
        queries = rotated(queries.view(length, heads, size))
        mixed = []
        for s in range(length):
            for i in range(heads):
                g = i // (heads // groups)
                seen = slice(max(0, s + 1 - (config.sliding_window or length)), s + 1)
                weights = (keys[seen, g] @ queries[s, i] / size**0.5).softmax(0)
                mixed.append(weights @ values[seen, g])
        x = x + torch.stack(mixed).view(length, heads * size) @ block.mixer.output.weight.T
        h = rms(x, block.feed_forward_norm.weight, config.norm_epsilon)
        gate, up = (h @ block.feed_forward.gate_up.weight.T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ block.feed_forward.down.weight.T
    return rms(x, model.final_norm.weight, config.norm_epsilon) @ model.head.weight.T


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


@pytest.mark.parametrize(("qk_norm", "widths"), [("head", (4, 4)), ("projection", (16, 8))])
def test_norms_of_queries_and_keys_are_small_vectors_and_only_owners_have_keys(qk_norm, widths):
    """Vectors have no weight decay; none of the parameters that are there without them moves."""
    plain, model = small_model(small_config(kv_layers=2)), small_model(small_config(kv_layers=2, qk_norm=qk_norm))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    added = {f"blocks.{layer}.mixer.query_norm.weight": (widths[0],) for layer in range(4)}
    added |= {f"blocks.{layer}.mixer.key_norm.weight": (widths[1],) for layer in (0, 2)}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()} | added
    assert all((model.get_parameter(name) == 1).all() for name in added)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_norm_forgets_the_scale_of_what_it_norms():
    """Of every head for itself, or of all heads of the projection together."""
    ids = random_ids(1, LENGTH)
    for qk_norm, forgets_a_head in (("head", True), ("projection", False), ("none", False)):
        model = small_model(small_config(num_kv_heads=2, qk_norm=qk_norm, norm_epsilon=1e-12)).eval()
        keys = [block.mixer.key.weight.data for block in model.blocks]
        with torch.no_grad():
            before = model(tokens_of(ids)).logits_BSV
            for weight in keys:
                weight *= 3.0
            scaled = model(tokens_of(ids)).logits_BSV
            for weight in keys:
                weight[:4] *= 2.0  # of the first head alone
            uneven = model(tokens_of(ids)).logits_BSV
        # Norms in fp64 with an epsilon of 1e-12.
        assert torch.allclose(scaled, before, rtol=0, atol=1e-8) == (qk_norm != "none"), qk_norm
        assert torch.allclose(uneven, scaled, rtol=0, atol=1e-8) == forgets_a_head, qk_norm


def dense_attention(documents, windows):
    """In place of attention by blocks: one mask of all pairs, for the layers in their order."""
    waiting = list(windows)

    def attend(q, k, v, blocks):
        del blocks
        positions = torch.arange(q.shape[2])[None]
        mask = visible_keys(positions, positions, documents, documents, waiting.pop(0))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return attend


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
@pytest.mark.parametrize("kv", [{"num_kv_heads": 4}, {"num_kv_heads": 1}, {"kv_layers": 2}, {"kv_layers": 1}], ids=str)
@pytest.mark.parametrize("windows", [{}, {"sliding_window": 40}, {"window_pattern": [90, 20, None, 7]}], ids=str)
def test_packed_rows_equal_one_dense_mask_with_all_gradients(monkeypatch, windows, kv, recompute):
    config = small_config(isolate_documents=True, moe_every=0, moe={}, **windows, **kv)
    ids = random_ids(2, 230)
    documents = (torch.rand(2, 230, generator=torch.Generator().manual_seed(3)) < 0.02).long().cumsum(1)
    found = []
    for is_dense in (False, True):
        model = small_model(config, recompute="none" if is_dense else recompute).train()
        if is_dense:
            monkeypatch.setattr(attention, "attend_blocks", dense_attention(documents, config.layer_windows))
        model(tokens_of(ids, documents_BS=documents), targets_BS=ids.roll(-1, 1)).total.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-9, atol=1e-10, msg=name)  # fp64, sums of 460 losses
        assert grad.abs().max() > 1e-6, name
