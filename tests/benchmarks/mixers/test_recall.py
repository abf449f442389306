"""Sequences of associative recall."""

import torch

from benchmarks.mixers.recall import KINDS, LENGTH, PAIRS, SEGMENT, SEGMENTS, draw_sequences, measure_recall
from benchmarks.mixers.rows import ATTENTION


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
