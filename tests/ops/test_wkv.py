"""The average of RWKV-4 in chunks against its direct sum."""

import pytest
import torch

from moe_train.ops.wkv import CHUNK, Average, wkv
from tests.model.mixers import slow

WIDTH = 3


def random(length: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    k, v = (torch.randn(2, length, WIDTH, dtype=dtype, generator=generator) * 3 for _ in range(2))
    w, u = -torch.randn(WIDTH, dtype=dtype, generator=generator).exp(), torch.randn(WIDTH, dtype=dtype)
    return k, v, w, u


def average(k, v, w, u, begins=None):
    begins = torch.zeros(k.shape[:2], dtype=torch.bool) if begins is None else begins
    return wkv(k, v, w, u, Average.empty(k[:, 0]), begins)[0]


def direct(k, v, w, u, begins):
    """The direct sum over each document of each row."""
    rows = []
    for row in range(len(k)):
        starts = sorted({0, *begins[row].nonzero().flatten().tolist()})
        spans = [slice(start, end) for start, end in zip(starts, [*starts[1:], k.shape[1]], strict=True)]
        rows.append(torch.cat([slow.rwkv4_average(k[row, span], v[row, span], w, u) for span in spans]))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, CHUNK, 4 * CHUNK + 3])
def test_outputs_and_gradients_are_those_of_the_direct_sum(length):
    leaves = [each.requires_grad_() for each in random(length)]
    k, v, w, u = leaves
    begins = torch.zeros(2, length, dtype=torch.bool)
    begins[0, length // 3] = begins[0, length // 2] = begins[1, length - 1] = True
    found = average(k, v, w, u, begins)
    expected = direct(k, v, w, u, begins)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # A single token does not depend on w.
    gradients = (torch.autograd.grad((y * upstream).sum(), leaves, materialize_grads=True) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [1, 5, CHUNK, 3 * CHUNK + 3])
def test_it_goes_on_from_a_state(length):
    """From a state of several chunks, over chunks that a document begins in, and over none."""
    start = 2 * CHUNK + 5
    leaves = [each.requires_grad_() for each in random(start + length)]
    k, v, w, u = leaves
    begins = torch.zeros(2, start + length, dtype=torch.bool)
    begins[1, start + length // 2] = True  # the first row goes on to the end
    _, before = wkv(k[:, :start], v[:, :start], w, u, Average.empty(k[:, 0]), begins[:, :start])
    found, _ = wkv(k[:, start:], v[:, start:], w, u, before, begins[:, start:])
    expected = direct(k, v, w, u, begins)[:, start:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad((y * upstream).sum(), leaves) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("counts", [(0, 1), (CHUNK, CHUNK + 1), (7, 2 * CHUNK + 2)])
def test_tokens_that_are_not_valid_change_no_sum(counts):
    start, length = CHUNK + 3, 2 * CHUNK + 2
    k, v, w, u = random(start + length)
    begins = torch.zeros(2, start + length, dtype=torch.bool)
    begins[1, start + CHUNK] = True  # which is not valid with the first counts
    _, before = wkv(k[:, :start], v[:, :start], w, u, Average.empty(k[:, 0]), begins[:, :start])
    valid = torch.arange(length) < torch.tensor(counts)[:, None]
    _, after = wkv(k[:, start:], v[:, start:], w, u, before, begins[:, start:], valid)
    more_k, more_v, _, _ = random(CHUNK + 1)
    found, _ = wkv(more_k, more_v, w, u, after, torch.zeros(2, CHUNK + 1, dtype=torch.bool))
    for row, count in enumerate(counts):
        kept = start + count
        own_k, own_v = (torch.cat((old[row, :kept], new[row])) for old, new in ((k, more_k), (v, more_v)))
        own_begins = torch.cat((begins[row, :kept], torch.zeros(CHUNK + 1, dtype=torch.bool)))
        expected = direct(own_k[None], own_v[None], w, u, own_begins[None])[0, kept:]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-12)


def test_it_is_a_mean_of_the_values_so_far_whatever_constant_the_keys_have():
    k, v, w, u = random(3 * CHUNK + 1)
    found = average(k, v, w, u)
    assert (found <= v.cummax(1).values + 1e-12).all() and (found >= v.cummin(1).values - 1e-12).all()
    torch.testing.assert_close(average(k + 7.5, v, w, u), found, rtol=0, atol=1e-12)


def test_the_strongest_and_the_weakest_decay():
    k, v, _, u = random(3 * CHUNK + 1)
    strongest = average(k, v, -torch.tensor(20.0).double().exp().expand(WIDTH), u)
    pair = torch.stack((k[:, :-1], k[:, 1:] + u)).softmax(0)  # the token before, and the own one
    expected = pair[0] * v[:, :-1] + pair[1] * v[:, 1:]
    torch.testing.assert_close(strongest[:, 1:], expected, rtol=0, atol=1e-12)
    weakest = average(k, v, torch.full((WIDTH,), -2e-9, dtype=torch.float64), u)
    longest = torch.cat((k[:, :-1], k[:, -1:] + u), dim=1).softmax(1)
    # 48 tokens with decays of 2e-9 each, and values of order 10.
    torch.testing.assert_close(weakest[:, -1], (longest * v).sum(1), rtol=0, atol=1e-6)


def test_large_keys_are_finite_in_fp32():
    k, v, w, u = (each.float() for each in random(3 * CHUNK + 1))
    k = (k / k.abs().max() * 300).requires_grad_()
    w = (w * 1e6).requires_grad_()
    y = average(k, v, w, u)
    y.sum().backward()
    assert y.isfinite().all() and k.grad.isfinite().all() and w.grad.isfinite().all()
