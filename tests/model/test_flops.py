"""Operations of training, against counts by hand and against what torch counts in a real step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_train.model.flops import training_flops_per_token
from tests.model.small import VOCAB, random_ids, small_config, small_model, tokens_of

LENGTH = 8


def by_hand(hidden, layers, heads, kv_heads, head_dim, inner, experts, top_k, owners, length, tied=False):
    attention = layers * 2 * hidden * heads * head_dim + owners * 2 * hidden * kv_heads * head_dim
    dense = (layers - layers // 2) * 3 * hidden * inner
    sparse = (layers // 2) * (top_k * 3 * hidden * inner + 2 * hidden * experts)  # gate and noise
    scores = layers * heads * head_dim * 2 * (length + 1) / 2
    return 6 * (attention + dense + sparse + VOCAB * hidden + scores)


@pytest.mark.parametrize("owners", [4, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_by_hand(owners, tied):
    config = small_config(kv_layers=owners, tie_embeddings=tied)
    expected = by_hand(16, 4, 4, 2, 4, 12, 4, 2, owners, LENGTH)
    assert training_flops_per_token(config, VOCAB, LENGTH) == pytest.approx(expected)


def test_a_window_leaves_fewer_keys():
    seen = [training_flops_per_token(small_config(sliding_window=window), VOCAB, 6) for window in (None, 100, 6, 3)]
    assert seen[0] == seen[1] == seen[2]
    keys = (1 + 2 + 3 + 3 + 3 + 3) / 6
    assert seen[0] - seen[3] == pytest.approx(6 * 4 * 4 * 4 * 2 * (3.5 - keys))


def test_windows_by_layer_are_counted_by_layer():
    def flops(**changes):
        return training_flops_per_token(small_config(**changes), VOCAB, 6)

    mean = (flops() + flops(sliding_window=3)) / 2
    assert flops(window_pattern=[3, None]) == pytest.approx(mean, rel=1e-12)
    assert flops(window_pattern=[3]) == flops(sliding_window=3)


def test_against_what_torch_counts():
    """Dense layers and one token, for which no key is masked and no product is left out or made twice."""
    config = small_config(moe_every=0, moe={})
    model = small_model(config, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(tokens_of(random_ids(3, 1))).logits_BSV.sum().backward()
    counted = counter.get_total_flops()
    expected = 3 * training_flops_per_token(config, VOCAB, 1)
    # The scores of one key are computed by another kernel, forward and backward not alike: they are 1% here.
    assert counted == pytest.approx(expected, rel=0.03)
