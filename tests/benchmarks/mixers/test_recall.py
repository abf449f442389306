"""Sequences of associative recall."""

import torch

from benchmarks.mixers.recall import KINDS, LENGTH, PAIRS, SEGMENT, SEGMENTS, draw_sequences, measure_recall
from benchmarks.mixers.rows import ATTENTION


def test_the_first_segment_tells_the_values_of_the_last() -> None:
    ids_BS, places_BP = draw_sequences(20, torch.Generator().manual_seed(0))
    assert ids_BS.shape == (20, LENGTH) and places_BP.shape == (20, PAIRS) and LENGTH == SEGMENTS * SEGMENT
    for ids, places in zip(ids_BS.tolist(), places_BP.tolist()):
        pairs = dict(zip(ids[:SEGMENT:2], ids[1:SEGMENT:2]))
        assert len(pairs) == PAIRS and max(pairs) < KINDS <= min(pairs.values()) < 2 * KINDS
        assert {ids[place]: ids[place + 1] for place in places} == pairs and min(places) == LENGTH - SEGMENT
        assert min(ids[SEGMENT:-SEGMENT]) >= 2 * KINDS  # neither keys nor values in between
    keys_BP = ids_BS.gather(1, places_BP)
    assert (keys_BP != ids_BS[:, 0:SEGMENT:2]).any(1).float().mean() > 0.9  # in another order


def test_a_model_without_training_guesses() -> None:
    found = measure_recall(ATTENTION, 1, seed=0)
    assert found.accuracy < 3 / KINDS and found == measure_recall(ATTENTION, 1, seed=0)
