"""Dispatch and combine: every assignment reaches its expert exactly once, and comes back to its token."""

import pytest
import torch

from moe_train.model.moe.dispatch import FlatDispatcher, UniqueDispatcher
from moe_train.model.moe.steps import Routing
from moe_train.ops.row_map import spread, sum_places
from moe_train.parallel.collectives import world_group
from tests.model.small import sums_with

EXPERTS, TOP_K = 8, 2
TOKENS = [5, 1, 0, 9]


def routing_of(rank: int) -> Routing:
    generator = torch.Generator().manual_seed(rank)
    tokens = TOKENS[rank]
    experts = torch.rand(tokens, EXPERTS - 1, generator=generator).topk(TOP_K, dim=1).indices  # nobody picks the last
    gates = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64)
    return Routing(gates, experts, torch.zeros(tokens, EXPERTS), sums_with([EXPERTS]))


def tags(rank: int) -> torch.Tensor:
    """One row a token, telling its rank and place."""
    return torch.tensor([[100.0 * rank + t, 1.0] for t in range(TOKENS[rank])], dtype=torch.float64).view(-1, 2)


def send_and_return(rank, world_size):
    routing, x = routing_of(rank), tags(rank)
    dispatcher, group = FlatDispatcher(), world_group()
    dispatched = dispatcher.dispatch(x, routing, EXPERTS, group)
    assignments = dispatched.assignments
    rows = spread(dispatched.rows_ND, assignments.row_map)
    # An "expert" that multiplies by its number + 1.
    local = EXPERTS // world_size
    numbers = torch.arange(rank * local, (rank + 1) * local).repeat_interleave(assignments.counts_e)
    factors = assignments.gates_R * (numbers + 1)
    back = dispatcher.combine(sum_places(rows * factors[:, None], assignments.row_map), dispatched, group)
    return rows, assignments.counts_e, dispatched.send, dispatched.receive, back


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_assignment_once_and_back(world_size, request):
    results = (
        [send_and_return(0, 1)]
        if world_size == 1
        else request.getfixturevalue(f"pool{world_size}").run(send_and_return, timeout=60)
    )
    local = EXPERTS // world_size
    for rank, (rows, counts, send, receive, back) in enumerate(results):
        expected = []  # by expert, then by source rank, then by token
        for expert in range(rank * local, (rank + 1) * local):
            for source in range(world_size):
                expected += [
                    100 * source + t for t in range(TOKENS[source]) if expert in routing_of(source).experts_TK[t]
                ]
        assert rows[:, 0].tolist() == expected
        assert counts.sum() == len(expected)
        if world_size > 1:  # alone, nothing moves
            assert sum(receive) == len(expected) and sum(send) == TOKENS[rank] * TOP_K
            assert len(send) == len(receive) == world_size
        routing = routing_of(rank)
        factors = (routing.gates_TK * (routing.experts_TK + 1)).sum(1, keepdim=True)
        torch.testing.assert_close(back, tags(rank) * factors, rtol=1e-14, atol=0)  # fp64, two terms
    for rank in range(world_size if world_size > 1 else 0):
        assert [results[other][2][rank] for other in range(world_size)] == list(results[rank][3])


def send_with_some_left_out(rank, world_size, top_k):
    """Rows that unique sends and where they come to, with assignments that are not executed."""
    generator = torch.Generator().manual_seed(10 + rank)
    tokens = TOKENS[rank]
    experts = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k, dim=1).indices
    kept = torch.rand(tokens, top_k, generator=generator) < 0.7
    gates = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    routing = Routing(gates, experts, torch.zeros(tokens, EXPERTS), sums_with([EXPERTS]), kept)
    dispatcher, group = UniqueDispatcher(), world_group()
    dispatched = dispatcher.dispatch(tags(rank), routing, EXPERTS, group)
    local = EXPERTS // world_size
    pairs = {(t, int(e) // local) for t in range(tokens) for e, is_kept in zip(experts[t], kept[t]) if is_kept}
    expected_send = [sum(1 for _, destination in pairs if destination == p) for p in range(world_size)]
    numbers = torch.arange(rank * local, (rank + 1) * local).repeat_interleave(dispatched.assignments.counts_e)
    factors = dispatched.assignments.gates_R * (numbers + 1)
    rows = spread(dispatched.rows_ND, dispatched.assignments.row_map) * factors[:, None]
    back = dispatcher.combine(sum_places(rows, dispatched.assignments.row_map), dispatched, group)
    expected = tags(rank) * (gates * (experts + 1) * kept).sum(1, keepdim=True)
    return list(dispatched.send), expected_send, len(dispatched.rows_ND), sum(dispatched.receive), back, expected


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_unique_sends_a_row_once_to_each_rank_with_executed_assignments(top_k, pool4):
    for send, expected_send, rows, received, back, expected in pool4.run(send_with_some_left_out, top_k, timeout=60):
        assert send == expected_send
        assert rows == received
        torch.testing.assert_close(back, expected, rtol=1e-13, atol=0)  # fp64, a few terms
