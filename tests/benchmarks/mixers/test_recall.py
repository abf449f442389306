"""Sequences of associative recall."""

import pytest
import torch

from benchmarks.mixers import recall
from benchmarks.mixers.recall import KINDS, LENGTH, PAIRS, SEGMENT, SEGMENTS, draw_sequences, measure_recall
from benchmarks.mixers.rows import ALONE, ATTENTION, Variant
from moe_train.model.parameters import optim_rules


def test_the_first_segment_tells_the_values_of_the_last() -> None:
    drawn = draw_sequences(20, torch.Generator().manual_seed(0))
    assert drawn.ids_BS.shape == (20, LENGTH) and LENGTH == SEGMENTS * SEGMENT
    rows = zip(drawn.ids_BS.tolist(), drawn.places_BP.tolist(), drawn.values_BP.tolist())
    for ids, places, values in rows:
        pairs = dict(zip(ids[:SEGMENT:2], ids[1:SEGMENT:2]))
        assert len(pairs) == len(set(pairs.values())) == PAIRS
        assert max(pairs) < KINDS <= min(pairs.values()) and max(pairs.values()) < 2 * KINDS
        assert {ids[place]: value for place, value in zip(places, values)} == pairs
        assert min(places) == LENGTH - SEGMENT
        # No value comes again, and no key before the last segment.
        assert min([*ids[SEGMENT:-SEGMENT], *ids[1 - SEGMENT :: 2]]) >= 2 * KINDS
    keys_BP = drawn.ids_BS.gather(1, drawn.places_BP)
    assert (keys_BP != drawn.ids_BS[:, 0:SEGMENT:2]).any(1).float().mean() > 0.8  # in another order


def test_a_model_without_training_guesses() -> None:
    assert PAIRS == 8  # so that an eighth is right
    found = measure_recall(ATTENTION, 1, seed=0)
    assert found.accuracy < 0.2 and found == measure_recall(ATTENTION, 1, seed=0)


@pytest.mark.parametrize("variant", (ATTENTION, *ALONE), ids=lambda variant: variant.name)
def test_every_parameter_is_trained_by_its_rule(variant: Variant) -> None:
    model = recall.build(variant, 0)
    groups = recall.parameter_groups(model)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(optim_rules(model))
    rules, usual = optim_rules(model), groups[0]["lr"] / groups[0]["lr_factor"]
    for name, parameter in model.named_parameters():
        group, rule = found[id(parameter)], rules[name]
        assert group["lr"] == usual * group["lr_factor"] and group["lr_factor"] == rule.lr_factor
        assert (group["weight_decay"] > 0) is rule.weight_decay
    factors = {"infini": {1.0, 33.0}, "rwkv4": {1.0, 2.0, 3.0}, "rwkv7": {1.0, 2.0}}
    assert {group["lr_factor"] for group in groups} == factors.get(variant.name, {1.0})
