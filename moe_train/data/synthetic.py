"""Synthetic tokens: random bytes, for checks and timing where the text does not matter."""

import numpy as np

from moe_train.data.sequences import TrainEntry

NUM_TOKENS = 1 << 20
_NO_TARGET_EVERY = 8  # sequences, where targets are ignored: the last of these has none


def synthetic_entry(sequence_length: int, ignored_targets: float) -> TrainEntry:
    """Make random tokens, of which some are no targets.

    Args:
        sequence_length: Tokens per sequence.
        ignored_targets: Largest share of a sequence's targets that is ignored. Each sequence has a share of its own
            between 0 and this; with more than 0, one sequence of eight has no target at all.

    Returns:
        The entry, the same on every rank.
    """
    draws = np.random.default_rng(0)
    num_sequences = max(_NO_TARGET_EVERY, NUM_TOKENS // sequence_length)
    tokens = draws.integers(0, 256, num_sequences * sequence_length + 1).astype(np.uint16)
    if not ignored_targets:
        return TrainEntry(tokens)
    shares = draws.uniform(0.0, ignored_targets, num_sequences)
    shares[_NO_TARGET_EVERY - 1 :: _NO_TARGET_EVERY] = 1.0
    counts = draws.uniform(size=(num_sequences, sequence_length)) >= shares[:, None]
    return TrainEntry(tokens, is_target=np.concatenate(([False], counts.reshape(-1))))
