"""Collective operations and groups on real ranks, gradients included."""

import pytest
import torch

from moe_train.distributed.all_to_all import Splits, start_counts, start_rows
from moe_train.distributed.collectives import (
    all_reduce_sum,
    barrier,
    gather_objects,
    group_rank,
    group_size,
    world_group,
)
from moe_train.distributed.mesh import create_mesh, expert_data_parallel_ranks, expert_parallel_ranks

SENT = [[2, 0, 3, 1], [0, 0, 0, 0], [1, 5, 0, 0], [0, 2, 2, 4]]  # rows from rank i to rank j; rank 1 has none


def rows_of(rank):
    return torch.tensor([[10.0 * rank + to, place] for to in range(4) for place in range(SENT[rank][to])]).view(-1, 2)


def exchange(rank, world_size):
    send, receive = SENT[rank], [SENT[source][rank] for source in range(world_size)]
    rows = rows_of(rank).requires_grad_()
    received = start_rows(rows, Splits(tuple(send), tuple(receive)), world_group()).wait()
    received.backward(100 * rank + received.detach())
    counts = start_counts(torch.tensor(SENT[rank])[:, None], world_group()).wait()
    return received.detach(), rows.grad, counts


def test_rows_reach_their_rank_and_gradients_come_back(pool4):
    for rank, (received, grad, counts) in enumerate(pool4.run(exchange, timeout=60)):
        expected = [[10.0 * s + rank, p] for s in range(4) for p in range(SENT[s][rank])]
        assert received.tolist() == expected
        upstream = [[100.0 * to] * 2 for to in range(4) for _ in range(SENT[rank][to])]
        assert torch.equal(grad, rows_of(rank) + torch.tensor(upstream).view(-1, 2))
        assert counts.flatten().tolist() == [SENT[source][rank] for source in range(4)]


def reduce(rank, world_size):
    group = world_group()
    x = torch.tensor([1.0, 10.0]).mul(rank + 1).requires_grad_()
    total = all_reduce_sum(x, group)
    (total * (rank + 1)).sum().backward()  # every rank's loss weighs the sum differently
    barrier()
    return total.detach(), x.grad, gather_objects({"rank": rank}), group_size(group), group_rank(group)


def test_reductions(pool4):
    for rank, (total, grad, objects, size, place) in enumerate(pool4.run(reduce, timeout=60)):
        assert total.tolist() == [10.0, 100.0]
        assert grad.tolist() == [10.0, 10.0]  # the sum of all ranks' upstream gradients
        assert objects == [{"rank": r} for r in range(4)]
        assert (size, place) == (4, rank)


def test_one_process_needs_no_group():
    x = torch.ones(3, 2)
    assert world_group() is None
    assert all_reduce_sum(x, None) is x
    assert gather_objects(5) == [5]
    assert (group_size(None), group_rank(None)) == (1, 0)
    barrier()


def describe_groups(rank, world_size, ep_size):
    mesh = create_mesh(ep_size, timeout_seconds=60)
    sums = [all_reduce_sum(torch.tensor([2.0**rank]), g).item() for g in (mesh.expert.group, mesh.expert_data.group)]
    assert (mesh.data.rank, mesh.data.ranks) == (rank, tuple(range(world_size)))
    return mesh.expert.ranks, mesh.expert.rank, mesh.expert.size, mesh.expert_data.ranks, sums


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_groups_are_consecutive_and_strided(ep_size, pool4):
    for rank, (ep_ranks, ep_rank, size, edp_ranks, sums) in enumerate(pool4.run(describe_groups, ep_size, timeout=60)):
        assert ep_ranks == tuple(range(rank // ep_size * ep_size, rank // ep_size * ep_size + ep_size))
        assert edp_ranks == tuple(range(rank % ep_size, 4, ep_size))
        assert (ep_ranks[ep_rank], size) == (rank, ep_size)
        assert sums == [sum(2.0**r for r in ep_ranks), sum(2.0**r for r in edp_ranks)]


def test_layouts():
    assert expert_parallel_ranks(6, 2) == [(0, 1), (2, 3), (4, 5)]
    assert expert_data_parallel_ranks(6, 2) == [(0, 2, 4), (1, 3, 5)]
