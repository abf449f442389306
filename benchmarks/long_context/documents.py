"""Rows of the long_context benchmark: documents of Zipf lengths, and the window of what is windowed."""

import math

import numpy as np

WINDOW = 1024


def zipf_starts(length: int, seed: int) -> tuple[int, ...]:
    """Cut a row into documents, whose lengths follow a Zipf law from 16 tokens to the whole row.

    Args:
        length: S, tokens of the row.
        seed: Seed of the lengths.

    Returns:
        First columns of the documents, and S.
    """
    draws, starts = np.random.default_rng(seed), [0]
    while starts[-1] < length:
        size = 16 * math.exp(draws.random() * math.log(length / 16))  # density 1 / size
        starts.append(min(length, starts[-1] + int(size)))
    return tuple(starts)
