"""Keyed random numbers: the right distribution, and no dependence on how the draws are cut into pieces."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.ops import keyed_random
from moe_train.ops.keyed_random import combine, fill_normal_, make_key, normal, uniform

KEYS = st.integers(-(2**63), 2**63 - 1)
MASK = 2**64 - 1


def slow_hash(key: int, counter: int) -> int:
    """splitmix64's finaliser of key + counter * golden ratio, in Python integers."""
    bits = (key + counter * 0x9E3779B97F4A7C15) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    bits ^= bits >> 31
    return bits - 2**64 if bits >= 2**63 else bits


@settings(max_examples=200, deadline=None)
@given(key=KEYS, counter=KEYS)
def test_combine_is_splitmix64(key, counter):
    assert combine(key, torch.tensor(counter)).item() == slow_hash(key, counter)
    assert combine(torch.tensor(key), counter).item() == slow_hash(key, counter)


def test_combine_broadcasts():
    keys, counters = torch.arange(3).unsqueeze(1), torch.arange(4)
    table = combine(keys, counters)
    assert table.tolist() == [[slow_hash(k, c) for c in range(4)] for k in range(3)]


def test_keys_are_the_same_in_every_process():
    """A resumed run draws what it would have drawn: these numbers may not change."""
    assert make_key(0, "parameter", "embedding.weight") == -7720322316500041333
    assert make_key() == -5426141060434712860
    code = "from moe_train.ops.keyed_random import make_key; print(make_key(3, 'x', -1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(other.stdout) == make_key(3, "x", -1)


def test_keys_tell_their_parts_apart():
    parts = [(1, "a"), ("1", "a"), ("a", 1), (1, "b"), (2, "a"), (1,), ("1a",), (11, "a"), (1, 1, "a"), ()]
    assert len({make_key(*p) for p in parts}) == len(parts)
    assert all(-(2**63) <= make_key(*p) < 2**63 for p in parts)


def test_uniform_is_inside_the_open_interval_at_extreme_bits():
    bits = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, 4095, 4096])
    values = uniform(bits)
    assert values.dtype == torch.float64
    assert (values > 0).all()
    assert (values < 1).all()
    assert values[0] == 2.0**-53  # all bits zero: the smallest
    assert values[2] == 1 - 2.0**-53  # all bits one: the largest
    assert values[6] == 1.5 * 2.0**-52
    assert normal(bits).isfinite().all()
    assert normal(bits)[0] == -normal(bits)[2]


def test_uniform_fills_the_interval_evenly():
    count, bins = 200_000, 100
    values = uniform(combine(make_key("uniform"), torch.arange(count)))
    table = torch.histc(values, bins=bins, min=0, max=1)
    # Six standard deviations of a binomial count.
    assert (table - count / bins).abs().max() < 6 * math.sqrt(count / bins)


def test_moments_of_normal():
    count = 1_000_000
    z = normal(combine(make_key("moments"), torch.arange(count)))
    # Standard errors of the mean of z, z^2, z^3, z^4 are sqrt(1, 2, 15, 96 / n); five of each.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 5 * math.sqrt(variance / count), power
    for threshold, share in ((1, 0.317310508), (2, 0.045500264), (3, 0.002699796)):
        measured = (z.abs() > threshold).double().mean().item()
        assert abs(measured - share) < 5 * math.sqrt(share / count), threshold


@pytest.mark.parametrize("distance", [1, 2, 1 << 20])
def test_neighbouring_keys_and_counters_are_uncorrelated(distance):
    count = 100_000
    counters = torch.arange(count)
    key = make_key("neighbours")
    one = normal(combine(key, counters))
    others = [
        normal(combine(key + distance, counters)),
        normal(combine(key, counters + distance)),
        normal(combine(combine(counters, key), 0)),
        normal(combine(combine(counters, key), distance)),
    ]
    for other in others:
        # The correlation of n independent pairs has standard deviation 1 / sqrt(n); five of them.
        assert abs((one * other).mean().item()) < 5 / math.sqrt(count)
        assert abs((one.square() * other.square()).mean().item() - 1) < 5 * math.sqrt(8 / count)


@settings(max_examples=50, deadline=None)
@given(
    key=KEYS,
    start=st.integers(0, 2**40),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    chunk=st.integers(1, 400),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_split_of_a_flat_range_gives_the_same_values(key, start, cuts, chunk, dtype):
    whole = torch.empty(300, dtype=dtype)
    fill_normal_(whole, key, start, 0.02)
    parts = torch.full((300,), torch.nan, dtype=dtype)
    edges = [0, *sorted(cuts), 300]
    before = keyed_random._CHUNK
    keyed_random._CHUNK = chunk  # elements hashed at once: how many may not matter either
    try:
        for a, b in itertools.pairwise(edges):
            fill_normal_(parts[a:b], key, start + a, 0.02)
    finally:
        keyed_random._CHUNK = before
    assert torch.equal(whole, parts)
    place = start + 17
    assert whole[17] == (normal(torch.tensor(slow_hash(key, place))) * 0.02).to(dtype)


def test_fill_takes_any_shape_and_scales():
    flat, shaped, double = torch.empty(24), torch.empty(2, 3, 4), torch.empty(24)
    fill_normal_(flat, 5, 7, 1.0)
    fill_normal_(shaped, 5, 7, 1.0)
    fill_normal_(double, 5, 7, 2.0)
    assert torch.equal(shaped.view(-1), flat)
    assert torch.equal(double, 2 * flat)
    other = torch.empty(24)
    fill_normal_(other, 6, 7, 1.0)
    assert not torch.isclose(other, flat).any()
