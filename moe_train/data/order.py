"""The order of training samples: pure functions of the seed and the global sample index, in constant memory.

Nothing here knows of ranks, batches or where a run was resumed, so the order is the same for every layout.
Legend: N samples asked for, E entries of the mixture, P blocks of a period, U different blocks asked for, B samples of
a block.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_SAMPLES = 1024  # consecutive samples within which every entry of a mixture gets its share
PERIOD_BLOCKS = 1024  # blocks after which the pattern of rounded shares repeats: shares are exact to 1 in 2**20
FEISTEL_ROUNDS = 8


@dataclass(frozen=True)
class SampleLocations:
    """Where global samples are found; three int64 arrays of one length.

    Attributes:
        entry: Which entry of the mixture.
        epoch: How many times that entry has been gone through before.
        sequence: Which of the entry's sequences.
    """

    entry: np.ndarray
    epoch: np.ndarray
    sequence: np.ndarray


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood's 64-bit mixer: an invertible hash of uint64 values, wrapping on overflow.

    Source: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014, function mix64 (variant 13 constants).
    """
    with np.errstate(over="ignore"):  # wrapping is meant; numpy warns of it for single values
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def permutation_keys(seed: int, purpose: str, counters: np.ndarray) -> np.ndarray:
    """Independent keys for permutations.

    Args:
        seed: The run's seed.
        purpose: What is permuted; different purposes give unrelated keys.
        counters: int array, such as epochs or block numbers.

    Returns:
        uint64, the shape of counters.
    """
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    base = np.uint64(int.from_bytes(digest, "little"))
    return splitmix64(splitmix64(np.asarray(counters).astype(np.uint64)) ^ base)


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of range(n), evaluated at some indices.

    A Feistel network on the next power of four, applied again wherever it leaves the range (cycle walking).

    Args:
        indices: int64 in [0, n), any shape.
        n: Size of the range, up to 2**62.
        keys: uint64, broadcastable to indices: which permutation each index goes through.

    Returns:
        int64, the shape of indices.

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, sections 4 and 5.
    """
    indices, keys = np.broadcast_arrays(np.asarray(indices, dtype=np.int64), np.asarray(keys, dtype=np.uint64))
    assert np.all((indices >= 0) & (indices < n)), f"indices must lie in [0, {n})"
    half_bits = ((n - 1).bit_length() + 1) // 2
    flat = indices.astype(np.uint64).ravel()
    flat_keys = keys.ravel()
    outside = np.arange(flat.size)
    while outside.size:
        flat[outside] = _feistel(flat[outside], half_bits, flat_keys[outside])
        outside = outside[flat[outside] >= n]
    return flat.astype(np.int64).reshape(indices.shape)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for round_number in range(FEISTEL_ROUNDS):
        round_keys = splitmix64(keys + np.uint64(round_number))
        left, right = right, left ^ (splitmix64(right ^ round_keys) & mask)
    return (left << shift) | right


def mixture_slots(indices: np.ndarray, weights: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which entry of a mixture each global sample belongs to, and which of that entry's samples it is.

    Every block of BLOCK_SAMPLES gives each entry its share, rounded down or up; which blocks round up is spread evenly
    so that a whole period of PERIOD_BLOCKS gives shares to one in 2**20. Inside a block the order is permuted.

    Args:
        indices: int64 [N], global sample indices.
        weights: Positive share of each entry, relative to the others.
        seed: The run's seed.

    Returns:
        Entry and position within the entry, both int64. An entry's positions rise by one from sample to sample.
    """
    indices = np.asarray(indices, dtype=np.int64)
    shares = _period_shares(weights)
    counts_PE = _block_counts(shares)
    before_PE = np.cumsum(counts_PE, axis=0) - counts_PE
    blocks_U, which_N = np.unique(indices // BLOCK_SAMPLES, return_inverse=True)
    periods_U, rows_U = np.divmod(blocks_U, PERIOD_BLOCKS)
    keys_U1 = permutation_keys(seed, "mixture", blocks_U)[:, None]
    slots_UB = permute(np.arange(BLOCK_SAMPLES)[None, :], BLOCK_SAMPLES, keys_U1)
    ends_UE = np.cumsum(counts_PE[rows_U], axis=1)
    starts_UE = periods_U[:, None] * shares + before_PE[rows_U]
    entries_UB = np.zeros_like(slots_UB)
    for end_U in ends_UE.T[:-1]:
        entries_UB += slots_UB >= end_U[:, None]
    positions_UB = np.zeros_like(slots_UB)
    for entry, start_U in enumerate(starts_UE.T):
        mine_UB = entries_UB == entry
        positions_UB += mine_UB * (start_U[:, None] + np.cumsum(mine_UB, axis=1) - 1)
    offsets_N = indices % BLOCK_SAMPLES
    return entries_UB[which_N, offsets_N], positions_UB[which_N, offsets_N]


def _period_shares(weights: Sequence[float]) -> np.ndarray:
    """Samples of each entry in a period, by largest remainder; at least one."""
    total = BLOCK_SAMPLES * PERIOD_BLOCKS
    exact = np.asarray(weights, dtype=np.float64)
    exact = exact / exact.sum() * total
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - shares), kind="stable")
    shares[by_remainder[: total - shares.sum()]] += 1
    for entry in np.flatnonzero(shares == 0):
        shares[entry] += 1
        shares[np.argmax(shares)] -= 1
    return shares


def _block_counts(shares_E: np.ndarray) -> np.ndarray:
    """Samples of each entry in each block of a period, int64 [PERIOD_BLOCKS, E]; every row sums to BLOCK_SAMPLES.

    The samples that do not divide evenly are laid out on a line, entry after entry, and block b takes the points at
    its bit-reversed number plus every multiple of PERIOD_BLOCKS: never two of one entry, and evenly spread over time.
    """
    base_E, extra_E = np.divmod(shares_E, PERIOD_BLOCKS)
    bits = PERIOD_BLOCKS.bit_length() - 1
    point_P = sum(((np.arange(PERIOD_BLOCKS) >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    ends_E = np.cumsum(extra_E)
    starts_E = ends_E - extra_E
    # Points p, p + P, p + 2P, ... that lie in [start, end): ceil((end - p) / P) - ceil((start - p) / P).
    points_P1 = np.asarray(point_P)[:, None]
    return base_E - (points_P1 - ends_E) // PERIOD_BLOCKS + (points_P1 - starts_E) // PERIOD_BLOCKS


def locate_samples(
    indices: np.ndarray, weights: Sequence[float], num_sequences: Sequence[int], seed: int
) -> SampleLocations:
    """Where each global sample is found: entry, epoch of that entry, and sequence.

    Args:
        indices: int64 [N], global sample indices in any order.
        weights: Share of each entry.
        num_sequences: Sequences of each entry; positive.
        seed: The run's seed.

    Returns:
        The locations. In every epoch of an entry each of its sequences comes once, in an order of that epoch's own.
    """
    entry_N, position_N = mixture_slots(indices, weights, seed)
    epoch_N = position_N // np.asarray(num_sequences, dtype=np.int64)[entry_N]
    sequence_N = np.empty_like(position_N)
    for entry, n in enumerate(num_sequences):
        mine = np.flatnonzero(entry_N == entry)
        keys = permutation_keys(seed, f"sequences of entry {entry}", epoch_N[mine])
        sequence_N[mine] = permute(position_N[mine] % n, n, keys)
    return SampleLocations(entry_N, epoch_N, sequence_N)
