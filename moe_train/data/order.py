"""Order of the training samples: pure functions of the seed and the global sample index, in constant memory.

These functions know no ranks, no batches and no resume point. So the order is the same for every layout.
Legend: N requested samples, E entries of the mixture, P blocks per period, U distinct requested blocks, B samples per
block.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_SAMPLES = 1024  # consecutive samples in which every entry of a mixture gets its share, rounded
PERIOD_BLOCKS = 1024  # blocks until the pattern of rounded shares repeats: shares are exact to 1 in 2**20
FEISTEL_ROUNDS = 8


@dataclass(frozen=True)
class SampleLocations:
    """Locations of global samples, as three int64 arrays of the same length.

    Attributes:
        entry: Index of the mixture entry.
        epoch: Number of earlier passes over this entry.
        sequence: Index of the sequence within the entry.
    """

    entry: np.ndarray
    epoch: np.ndarray
    sequence: np.ndarray


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash uint64 values with the 64-bit mixer of Steele, Lea and Flood: invertible, wrapping on overflow.

    Args:
        values: uint64, any shape.

    Returns:
        uint64, the shape of values.

    Source: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014, function mix64 (variant 13 constants).
    """
    with np.errstate(over="ignore"):  # wrapping is intended; numpy warns about it for single values
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def permutation_keys(seed: int, purpose: str, counters: np.ndarray) -> np.ndarray:
    """Make independent keys for permutations.

    Args:
        seed: Seed of the run.
        purpose: Name of what is permuted; different purposes give unrelated keys.
        counters: int array, such as epochs or block numbers.

    Returns:
        uint64, the shape of counters.
    """
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    base = np.uint64(int.from_bytes(digest, "little"))
    return splitmix64(splitmix64(np.asarray(counters).astype(np.uint64)) ^ base)


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Evaluate a keyed permutation of range(n) at given indices.

    A Feistel network permutes the next power of four. It is applied again to each value outside the range (cycle
    walking).

    Args:
        indices: int64 in [0, n), any shape.
        n: Size of the range, up to 2**62.
        keys: uint64, broadcastable to indices; the key of an index selects its permutation.

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
    """Find the mixture entry of each global sample, and its position among the samples of this entry.

    Every block of BLOCK_SAMPLES gives each entry its share, rounded down or up. The blocks that round up are spread
    evenly, so that a period of PERIOD_BLOCKS gives the shares to one in 2**20. Inside a block the order is permuted.

    Args:
        indices: int64 [N], global sample indices.
        weights: Positive share of each entry, relative to the others.
        seed: Seed of the run.

    Returns:
        Entry and position within the entry, both int64 [N]. The positions of an entry rise by one from sample to
        sample.
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
    """Divide the samples of a period among the entries, by largest remainder; each gets at least one."""
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
    """Count the samples of each entry in each block of a period.

    The samples that do not divide evenly are laid out on a line, entry after entry. Block b takes the points at its
    bit-reversed number plus every multiple of PERIOD_BLOCKS. So it never takes two points of one entry, and the points
    of an entry are spread evenly over time.

    Returns:
        int64 [PERIOD_BLOCKS, E]; every row sums to BLOCK_SAMPLES.
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
    """Locate each global sample: its mixture entry, the epoch of this entry, and the sequence.

    Args:
        indices: int64 [N], global sample indices in any order.
        weights: Positive share of each entry, relative to the others.
        num_sequences: Number of sequences of each entry; positive.
        seed: Seed of the run.

    Returns:
        Locations of the N samples. Every epoch of an entry contains each of its sequences once, in its own order.
    """
    entry_N, position_N = mixture_slots(indices, weights, seed)
    epoch_N = position_N // np.asarray(num_sequences, dtype=np.int64)[entry_N]
    sequence_N = np.empty_like(position_N)
    for entry, n in enumerate(num_sequences):
        mine = np.flatnonzero(entry_N == entry)
        keys = permutation_keys(seed, f"sequences of entry {entry}", epoch_N[mine])
        sequence_N[mine] = permute(position_N[mine] % n, n, keys)
    return SampleLocations(entry_N, epoch_N, sequence_N)
