"""The sample order: bijections, exact shares, and no dependence on how it is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.order import (
    BLOCK_SAMPLES,
    PERIOD_BLOCKS,
    locate_samples,
    mixture_slots,
    permutation_keys,
    permute,
)

SEEDS = st.integers(0, 2**63 - 1)
WEIGHTS = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=6)


def permutation(n: int, seed: int, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n), n, permutation_keys(seed, "test", np.array([epoch])))


@settings(max_examples=60, deadline=None)
@given(n=st.one_of(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 1024, 1025]), st.integers(1, 5000)), seed=SEEDS)
def test_every_key_gives_a_bijection(n, seed):
    assert np.array_equal(np.sort(permutation(n, seed)), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(10**6, 2**62), seed=SEEDS, start=st.integers(0, 2**40))
def test_large_ranges_stay_inside_and_do_not_collide(n, seed, start):
    indices = np.unique((np.arange(2000) * 7919 + start) % n)
    images = permute(indices, n, permutation_keys(seed, "test", np.array([0])))
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(indices)


def test_each_index_may_have_its_own_key():
    keys = permutation_keys(5, "test", np.arange(4))
    mixed = permute(np.arange(4), 100, keys)
    assert mixed.tolist() == [int(permute(np.array([i]), 100, keys[i : i + 1])[0]) for i in range(4)]


def test_seed_purpose_and_epoch_all_matter():
    def order(seed, purpose, epoch):
        return permute(np.arange(1000), 1000, permutation_keys(seed, purpose, np.array([epoch])))

    orders = [order(0, "a", 0), order(1, "a", 0), order(0, "b", 0), order(0, "a", 1)]
    # Two independent orders of 1000 agree in one place on average; 10 would be a chance of 1e-7.
    assert all(np.sum(x == y) < 10 for i, x in enumerate(orders) for y in orders[:i])
    assert np.array_equal(orders[0], order(0, "a", 0))


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_every_place_is_reached_equally_often(n):
    trials = 4000
    keys = permutation_keys(1, "test", np.arange(trials))
    images = permute(np.arange(n)[None, :], n, keys[:, None])
    table = np.stack([np.bincount(images[:, i], minlength=n) for i in range(n)])
    expected = trials / n
    # Six standard deviations of a binomial count.
    assert np.abs(table - expected).max() < 6 * np.sqrt(expected * (1 - 1 / n))


@pytest.mark.parametrize(("n", "orders"), [(2, 2), (3, 6), (4, 24)])
def test_every_order_of_a_few_things_comes_equally_often(n, orders):
    trials = 6000
    images = permute(np.arange(n)[None, :], n, permutation_keys(2, "test", np.arange(trials))[:, None])
    counts = np.unique(images, axis=0, return_counts=True)[1]
    assert len(counts) == orders
    # Six standard deviations of a binomial count.
    assert np.abs(counts - trials / orders).max() < 6 * np.sqrt(trials / orders)


def test_order_is_the_same_on_every_machine_and_version():
    """A run resumed after an update goes on with the same data: these numbers may not change."""
    assert permutation(10, seed=7).tolist() == [3, 4, 6, 2, 8, 7, 9, 1, 5, 0]
    entry, position = mixture_slots(np.arange(2048, 2060), [3.0, 1.0, 1.0], seed=7)
    assert entry.tolist() == [1, 0, 0, 2, 2, 0, 0, 0, 0, 2, 2, 2]
    assert position.tolist() == [410, 1229, 1230, 409, 410, 1231, 1232, 1233, 1234, 411, 412, 413]


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, seed=SEEDS, block=st.integers(0, 10**9))
def test_every_block_has_every_share_to_rounding(weights, seed, block):
    entry, _ = mixture_slots(np.arange(BLOCK_SAMPLES) + block * BLOCK_SAMPLES, weights, seed)
    counts = np.bincount(entry, minlength=len(weights))
    exact = np.array(weights) / sum(weights) * BLOCK_SAMPLES
    # One for rounding in the block; shares themselves are rounded to one in 2**20, or six where small ones take one.
    assert np.all(np.abs(counts - exact) < 1 + 6 / PERIOD_BLOCKS)


@settings(max_examples=10, deadline=None)
@given(weights=WEIGHTS, seed=SEEDS)
def test_rounding_errors_do_not_add_up(weights, seed):
    blocks = 64
    entry, _ = mixture_slots(np.arange(blocks * BLOCK_SAMPLES), weights, seed)
    exact = np.array(weights) / sum(weights) * blocks * BLOCK_SAMPLES
    # Bit-reversed numbers (van der Corput) miss an interval's share by at most log2(blocks) + 1 at each end.
    assert np.all(np.abs(np.bincount(entry, minlength=len(weights)) - exact) < 2 * 7)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [1.0, 1e-9], [1 / 3, 1 / 3, 1 / 3]])
def test_positions_of_an_entry_count_up_by_one(weights):
    samples = 3 * BLOCK_SAMPLES * PERIOD_BLOCKS // 2  # over the end of a period
    entry, position = mixture_slots(np.arange(samples), weights, seed=3)
    for number in range(len(weights)):
        mine = position[entry == number]
        assert np.array_equal(mine, np.arange(len(mine)))
        assert len(mine) > 0


def test_the_order_inside_a_block_is_mixed():
    entry, _ = mixture_slots(np.arange(4 * BLOCK_SAMPLES), [1.0, 1.0], seed=0)
    changes = np.sum(entry[1:] != entry[:-1])
    assert 0.45 < changes / len(entry) < 0.55  # half of the neighbours differ; 6 standard deviations of 0.008


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, start=st.integers(0, 10**7), chunks=st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_order_does_not_depend_on_how_it_is_batched(seed, start, chunks):
    indices = start + np.random.default_rng(seed).permutation(sum(chunks))
    weights, sizes = [2.0, 1.0, 0.1], [1000, 13, 1]
    whole = locate_samples(indices, weights, sizes, seed)
    parts = [locate_samples(part, weights, sizes, seed) for part in np.split(indices, np.cumsum(chunks)[:-1])]
    for name in ("entry", "epoch", "sequence"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 700))
def test_each_sequence_comes_once_an_epoch(seed, n):
    found = locate_samples(np.arange(3 * n), [1.0], [n], seed)
    assert found.epoch.tolist() == [i // n for i in range(3 * n)]
    for epoch in range(3):
        assert sorted(found.sequence[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_each_sequence_of_each_entry_comes_once_an_epoch_of_that_entry():
    sizes = [300, 70, 1]
    found = locate_samples(np.arange(5000), [5.0, 2.0, 1.0], sizes, seed=11)
    for entry, n in enumerate(sizes):
        mine = found.sequence[found.entry == entry]
        whole_epochs = len(mine) // n
        assert whole_epochs > 1
        rows = mine[: whole_epochs * n].reshape(whole_epochs, n)
        assert np.array_equal(np.sort(rows, axis=1), np.broadcast_to(np.arange(n), rows.shape))
        assert n == 1 or not np.array_equal(rows[0], rows[1])
