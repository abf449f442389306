"""Speeds and states: what is claimed, and that what is measured is what its variant says."""

import pytest
import torch

from benchmarks.mixers.rows import ALONE, ATTENTION
from benchmarks.mixers.speed import DECODED, LONG, SHORT, Speed, build, filled_cache, measure_speed, speed_claims
from moe_train.model.transformer import Tokens

RWKV4 = next(variant for variant in ALONE if variant.name == "rwkv4")


@pytest.mark.parametrize(
    ("times", "size", "holds"),
    [(1.09, 100, True), (0.91, 100, True), (1.12, 100, False), (0.85, 100, False), (1.0, 111, False)],
)
def test_a_fixed_state_keeps_its_time_and_its_bytes(times: float, size: int, holds: bool) -> None:
    # The second round was ten times as slow for both.
    short = Speed("rwkv4", SHORT, (1.0,), (1.0, 10.0, 1.0), 100)
    long = Speed("rwkv4", LONG, (1.0,), (times, 10 * times, 3.0), size)
    attention = [Speed("attention", context, (1.0,), (context / 1000,), context) for context in (SHORT, LONG)]
    (claim,) = speed_claims([short, long, *attention])
    assert claim["holds"] is holds and claim["claim"].startswith("rwkv4 decodes")
    assert speed_claims([short, *attention]) == []


def test_attention_keeps_more_with_the_context_and_rwkv_does_not() -> None:
    speeds = measure_speed([ATTENTION, RWKV4], [64, 128], rounds=2, seed=0)
    of = {(speed.variant, speed.context): speed for speed in speeds}
    assert of["attention", 128].state_bytes == 2 * of["attention", 64].state_bytes
    assert of["rwkv4", 128].state_bytes == of["rwkv4", 64].state_bytes
    assert all(len(speed.decode_seconds) == 2 and min(speed.train_seconds) > 0 for speed in speeds)


def test_a_state_is_filled_as_if_the_text_were_read_at_once() -> None:
    model = build(RWKV4, seed=0).eval()
    cache = filled_cache(model, 100, seed=3)
    ids_1S = torch.randint(4096, (1, 100 - DECODED), generator=torch.Generator().manual_seed(3))
    ids_11, sequences_1 = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        ours = model(Tokens(ids_11, sequences_1, first_position=100 - DECODED), cache).logits_BSV[:, -1]
        whole = model(Tokens(torch.cat((ids_1S, ids_11), 1), sequences_1)).logits_BSV[:, -1]
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)  # fp32, another order of sums
