"""Decoding batches of unequal prompts: each as if it were alone and read anew for every token."""

import pytest
import torch

from moe_train.infer.decode import DecodePlan, Decoder
from moe_train.infer.sampling import Sampling
from moe_train.model.mixers import visibility
from moe_train.model.transformer import Tokens
from tests.model.small import VOCAB, small_config, small_model

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [7], [2, 7, 1, 8, 2]]
KINDS = {
    "MHA": {"num_kv_heads": 4},
    "MQA": {"num_kv_heads": 1},
    "MLKV": {"num_kv_heads": 2, "kv_layers": 2},
    "MLKV, one for all": {"kv_layers": 1, "moe_every": 1},
    "window": {"sliding_window": 3, "kv_layers": 2},
    "windows by layer": {"window_pattern": [5, 2, 2, None], "kv_layers": [0, 2, 3]},
    "fixed states": {
        "mixers": ["infini", "ttt_linear", "rwkv4", "rwkv7"],
        "infini": {"segment_length": 4, "memory": "delta"},
        "ttt_linear": {"mini_batch": 3, "short_conv": True},
        "feed_forward": "rwkv_channel_mix",
    },
    "hybrid": {"mixers": ["ttt_mlp", "attention"], "ttt_mlp": {"mini_batch": 3}, "feed_forward": "rwkv7_channel_mix"},
    "hidden copies": {"hidden_copies": {"copies": 3}, "kv_layers": 2},
    "hidden copies, window": {"hidden_copies": {"copies": 2, "window_positions": 1, "chunk": 3}, "num_layers": 2},
}
kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


def continued(model, prompts, steps, **settings):
    plan = DecodePlan(steps, VOCAB, **settings)
    return [list(row) for row in zip(*(chosen.tolist() for chosen in Decoder(model, prompts, plan)), strict=True)]


def greedy_without_cache(model, prompt, steps):
    text = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(Tokens(torch.tensor([text]), torch.zeros(1, dtype=torch.int64))).logits_BSV
        text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


@kinds
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_unequal_prompts_go_on_as_each_alone(changes, chunk):
    model = small_model(small_config(**changes)).eval()
    expected = [greedy_without_cache(model, prompt, 6) for prompt in PROMPTS]
    assert continued(model, PROMPTS, 6, prefill_chunk=chunk) == expected
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize("changes", [KINDS[name] for name in ("MQA", "window", "windows by layer")], ids=str)
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_long_prompt_attends_in_parts(monkeypatch, changes, chunk):
    monkeypatch.setattr(visibility, "MOST_QUERIES", 3)
    seen = []
    attend = visibility.attend
    monkeypatch.setattr(visibility, "attend", lambda *args: seen.append(args) or attend(*args))
    for prompts in (PROMPTS, PROMPTS[1:2]):
        for changed in (changes, changes | {"isolate_documents": True}):
            model = small_model(small_config(**changed)).eval()
            expected = [greedy_without_cache(model, prompt, 6) for prompt in prompts]
            assert continued(model, prompts, 6, prefill_chunk=chunk) == expected
    assert max(q.shape[2] for q, *_, mask in seen if mask is not None) == 3


@kinds
def test_logits_of_unequal_prompts_equal_the_full_forward(changes):
    model = small_model(small_config(**changes)).eval()
    decoder = Decoder(model, PROMPTS, DecodePlan(3, VOCAB))
    seen = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: seen.append(forward(*args, **kwargs)) or seen[-1]
    chosen = torch.stack(list(decoder), 1).tolist()
    model.forward = forward
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *chosen[row]]
        with torch.no_grad():
            full = model(Tokens(torch.tensor([text]), torch.zeros(1, dtype=torch.int64))).logits_BSV[0]
        for step, output in enumerate(seen):
            # fp64: the order of sums differs
            torch.testing.assert_close(output.logits_BSV[row, -1], full[len(prompt) - 1 + step], rtol=0, atol=1e-10)


def test_draws_depend_on_seed_prompt_number_and_place_alone():
    model = small_model(small_config())
    sampled = {"sampling": Sampling(1.5, seed=4)}
    together = continued(model, PROMPTS, 8, **sampled)
    assert together == [continued(model, [p], 8, first_sequence=i, **sampled)[0] for i, p in enumerate(PROMPTS)]
    assert together != continued(model, PROMPTS, 8, sampling=Sampling(1.5, seed=5))
    twice = continued(model, [PROMPTS[0]] * 2, 8, **sampled)
    assert twice[0] != twice[1]


def test_isolated_documents():
    """A mark begins a document, in the prompt and in what follows it."""
    mark = 9
    model = small_model(small_config(isolate_documents=True)).eval()
    prompts = [[4, 5, mark, 3, 1], [mark, 2], [8, mark, mark, 6, 7, 1]]

    def is_of_isolated_documents(new, prompt):
        text = torch.tensor([[*prompt, *new]])
        tokens = Tokens(text, torch.zeros(1, dtype=torch.int64), documents_BS=(text == mark).cumsum(1))
        with torch.no_grad():
            logits = model(tokens).logits_BSV[0]
        return new == logits.argmax(1)[len(prompt) - 1 : -1].tolist()

    assert all(map(is_of_isolated_documents, continued(model, prompts, 7, end_of_document=mark), prompts))
    assert not all(map(is_of_isolated_documents, continued(model, prompts, 7), prompts))


def test_padding_rows_are_never_drawn():
    model = small_model(small_config())
    rows = continued(model, PROMPTS, 40, sampling=Sampling(5.0, seed=1))
    plan = DecodePlan(40, 8, Sampling(5.0, seed=1))
    few = [chosen.tolist() for chosen in Decoder(model, PROMPTS, plan)]
    assert max(map(max, few)) < 8 <= max(map(max, rows))


def test_cache_has_room_for_prompt_and_new_tokens():
    model = small_model(small_config(kv_layers=2), dtype=torch.float32)
    plan = DecodePlan(5, VOCAB, cache_dtype=torch.bfloat16)
    decoder = Decoder(model, PROMPTS, plan)
    assert decoder.max_length == 7 + 5
    assert decoder.cache.nbytes == 2 * len(PROMPTS) * (7 + 5) * 2 * 2 * 4 * 2  # 2 B S M G d of 2 bytes
    assert Decoder(model, PROMPTS, plan, padded_length=10).max_length == 15


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bf16_cache_errs_by_its_rounding(changes, dtype):
    # Dense layers: a router turns a rounding into another expert, whose output may be anything.
    config = small_config(**changes | {"moe_every": 0, "moe": {}})
    model = small_model(config, dtype=torch.float32).eval()
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        full = model(Tokens(text, torch.zeros(1, dtype=torch.int64))).logits_BSV[0]
    cache, worst = model.new_cache(1, 8, dtype), 0.0
    for place in range(8):
        tokens = Tokens(text[:, place : place + 1], torch.zeros(1, dtype=torch.int64))
        tokens = Tokens(tokens.ids_BS, tokens.sequences_B, positions_BS=torch.tensor([[place]]))
        with torch.no_grad():
            logits = model(tokens, cache).logits_BSV[0, 0]
        worst = max(worst, float((logits - full[place]).abs().max()))
    # bf16 keeps 8 bits: 2^-9 a value, grown by four layers; logits are of order 5.
    assert worst < (0.2 if dtype == torch.bfloat16 else 1e-4)
    assert worst > (1e-3 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("owners", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_eight_layers_in_ragged_chunks(owners, kv_heads, packed):
    """Every number of owners: what is decoded in any chunks is the full forward, gradients or not."""
    config = small_config(num_layers=8, num_kv_heads=kv_heads, kv_layers=owners, init_std=0.3)
    model = small_model(config).eval()
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(owners))
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 8 + [1] * 4]) if packed else None
    with torch.no_grad():
        full = model(Tokens(ids, torch.arange(2), documents_BS=documents)).logits_BSV
    cache, place, parts = model.new_cache(2, 12), 0, []
    for length in (4, 1, 3, 1, 1, 2):
        span = slice(place, place + length)
        tokens = Tokens(
            ids[:, span],
            torch.arange(2),
            positions_BS=torch.arange(place, place + length)[None],
            documents_BS=None if documents is None else documents[:, span],
        )
        with torch.no_grad():
            parts.append(model(tokens, cache).logits_BSV)
        place += length
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-10)  # fp64: the order of sums differs
    assert cache.layers_with_state == config.kv_owner_layers and len(cache.layers_with_state) == owners


@kinds
def test_a_bf16_model_decodes_within_its_rounding(changes):
    """As far from the full forward in bf16 as that is from the one in fp64, about."""
    config = small_config(**changes | {"moe_every": 0, "moe": {}})
    exact, narrow = small_model(config).eval(), small_model(config).eval()
    narrow.to(torch.bfloat16)
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        expected = exact(Tokens(text, torch.zeros(1, dtype=torch.int64))).logits_BSV
        full = narrow(Tokens(text, torch.zeros(1, dtype=torch.int64))).logits_BSV.double()
    cache, parts = narrow.new_cache(1, 8), []
    for span in (slice(0, 3), *(slice(i, i + 1) for i in range(3, 8))):
        positions = torch.arange(span.start, span.stop)[None]
        with torch.no_grad():
            tokens = Tokens(text[:, span], torch.zeros(1, dtype=torch.int64), positions_BS=positions)
            parts.append(narrow(tokens, cache).logits_BSV.double())
    rounding = float((full - expected).abs().max())
    assert float((torch.cat(parts, 1) - full).abs().max()) < 2 * rounding
    assert rounding < 0.5  # logits are of order 5
