"""Attention over ranks that share a row, against attention of the whole row with a mask: outputs and all gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe_train.distributed.collectives import group_rank
from moe_train.distributed.context import ContextRanks, ContextShard
from moe_train.distributed.context_attention import context_attention
from moe_train.distributed.mesh import create_mesh
from moe_train.distributed.observer import CommObserver
from moe_train.distributed.traffic import TrafficMeter
from moe_train.model.token_index import document_offsets
from moe_train.ops.attention import visible_keys
from moe_train.ops.ring_attention import Reach

BATCH, HEADS, LENGTH, SIZE = 2, 4, 32, 8
CASES = list(itertools.product((4, 2, 1), (False, True), (None, 5, 40)))  # key heads, documents, window


def sample(kv_heads, has_documents, dtype=torch.float64):
    random = torch.Generator().manual_seed(kv_heads)
    shapes = [(BATCH, heads, LENGTH, SIZE) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    tensors = [torch.randn(shape, dtype=dtype, generator=random) for shape in shapes]
    documents = (torch.rand(BATCH, LENGTH, generator=random) < 0.2).cumsum(1) if has_documents else None
    return tensors, documents


def whole(tensors, documents, window):
    """Outputs and gradients of q, k and v over the whole row, by one mask."""
    *inputs, upstream = tensors
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
    positions = torch.arange(LENGTH)[None]
    mask = visible_keys(positions, positions, documents, documents, window)
    repeats = HEADS // k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), attn_mask=mask
    )
    return out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)


def shard_of(group, size, documents, exchange, observer=None):
    ranks = ContextRanks(group, group_rank(group), size, exchange, observer or CommObserver())
    reach = None if documents is None else Reach.of(document_offsets(documents).numpy())
    return ContextShard(ranks, LENGTH, documents, reach)


def largest_differences(rank, world_size, exchange):
    group = create_mesh(1, 60, context_size=world_size).context.group
    differences = {}
    for case in CASES:
        kv_heads, has_documents, window = case
        tensors, documents = sample(kv_heads, has_documents)
        shard = shard_of(group, world_size, documents, exchange)
        columns = torch.from_numpy(shard.ranks.columns(LENGTH))
        expected = [tensor[:, :, columns] for tensor in whole(tensors, documents, window)]
        for recomputes in (False, True):
            q, k, v, upstream = (tensor[:, :, columns].clone() for tensor in tensors)
            own = [tensor.requires_grad_() for tensor in (q, k, v)]

            def run(q, k, v, shard=shard, window=window):
                return context_attention(q, k, v, shard, window)

            if recomputes:
                out = checkpoint(run, *own, use_reentrant=True, preserve_rng_state=False)
            else:
                out = run(*own)
            out.backward(upstream)
            found = [out.detach(), *(tensor.grad for tensor in own)]
            differences[(*case, recomputes)] = max(
                (a - b).abs().max().item() for a, b in zip(found, expected, strict=True)
            )
    return differences


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_is_that_of_the_whole_row(size, exchange, pool1, pool2, pool4):
    pool = {1: pool1, 2: pool2, 4: pool4}[size]
    for differences in pool.run(largest_differences, exchange, timeout=120):
        assert len(differences) == 2 * len(CASES)
        assert max(differences.values()) <= 1e-12, differences


def bf16_errors(rank, world_size):
    group = create_mesh(1, 60, context_size=world_size).context.group
    tensors, _ = sample(2, False)
    expected = whole(tensors, None, None)
    narrow = [tensor.bfloat16() for tensor in tensors]
    once = whole(narrow, None, None)
    shard = shard_of(group, world_size, None, "ring")
    columns = torch.from_numpy(shard.ranks.columns(LENGTH))
    q, k, v, upstream = (tensor[:, :, columns].clone() for tensor in narrow)
    own = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = context_attention(*own, shard)
    found = [out.detach(), *torch.autograd.grad(out, own, upstream)]
    ours = [(a.double() - b[:, :, columns]).square().mean().sqrt().item() for a, b in zip(found, expected, strict=True)]
    theirs = [(a.double() - b).square().mean().sqrt().item() for a, b in zip(once, expected, strict=True)]
    return ours, theirs


def test_bf16_is_at_most_twice_as_wrong_as_one_call(pool4):
    for ours, theirs in pool4.run(bf16_errors, timeout=60):
        assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


class Messages:
    """A flight recorder that only counts what is started."""

    def __init__(self):
        self.started = []

    def start(self, collective):
        self.started.append((collective.operation, collective.direction))

    def begin(self, collective):
        del collective

    def end(self):
        pass


def count_traffic(rank, world_size, exchange):
    group = create_mesh(1, 60, context_size=world_size).context.group
    (q, k, v, upstream), _ = sample(2, False, torch.float32)
    meter, messages = TrafficMeter(torch.device("cpu")), Messages()
    shard = shard_of(group, world_size, None, exchange, CommObserver(meter, messages))
    columns = torch.from_numpy(shard.ranks.columns(LENGTH))
    own = [tensor[:, :, columns].clone().requires_grad_() for tensor in (q, k, v)]
    with meter.counting():
        out = context_attention(*own, shard)
        forward = meter.read().num_bytes
        out.backward(upstream[:, :, columns])
    return forward, meter.read().num_bytes - forward, messages.started


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_messages_and_bytes_are_those_of_the_formula(exchange, pool4):
    ranks, kv_heads = 4, 2
    keys = 2 * BATCH * (LENGTH // ranks) * kv_heads * SIZE * 4  # X
    for forward, backward, started in pool4.run(count_traffic, exchange, timeout=60):
        assert forward == (ranks - 1) * keys
        if exchange == "ring":  # gradients make one hop more: home
            assert backward == (ranks - 1) * keys + ranks * keys
            assert started.count(("ring_keys", "forward")) == started.count(("ring_keys", "backward")) == ranks - 1
            assert started.count(("ring_gradients", "backward")) == ranks
        else:
            assert backward == 2 * (ranks - 1) * keys
            assert started == [
                ("all_gather_keys", "forward"),
                ("all_gather_keys", "backward"),
                ("scatter_gradients", "backward"),
            ]
