"""Dispatch and combine: every assignment reaches its expert exactly once, and comes back to its token."""

from typing import Any

import pytest
import torch

from moe_train.distributed.all_to_all import Splits
from moe_train.model.moe.dispatch.base import Dispatcher
from moe_train.model.moe.steps import Routing
from moe_train.ops.payload import Payload
from moe_train.ops.row_map import gather_rows, scatter_add_rows
from tests.model.moe.dispatchers import groups_of, make_dispatcher
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


def through(dispatcher: Dispatcher, x: torch.Tensor, routing: Routing, rank: int):
    """Every chunk's rows at this rank's experts, and all tokens' outputs of "experts" that multiply by number + 1."""
    chunks, outputs = [], []
    for chunk in dispatcher.plan(x, routing):
        dispatched = dispatcher.start(chunk).wait()
        assignments = dispatched.assignments
        local = len(assignments.counts_e)
        numbers = torch.arange(rank * local, (rank + 1) * local).repeat_interleave(assignments.counts_e)
        rows = gather_rows(dispatched.rows_ND, assignments.row_map)
        factors = assignments.gates_R * (numbers + 1)
        summed = scatter_add_rows(rows * factors[:, None], assignments.row_map)
        outputs.append(dispatcher.start_combine(summed, dispatched).wait())
        chunks.append((dispatched, rows))
    return chunks, torch.cat(outputs)


def stages(dispatched: Any) -> list[Splits]:
    """How many rows went where, in each stage."""
    sent = dispatched.sent
    if sent is None:
        return []
    return [each.splits for each in (sent if isinstance(sent, tuple) else (sent,))]


def send_and_return(rank, world_size):
    routing, x = routing_of(rank), tags(rank)
    dispatcher = make_dispatcher("flat", groups_of(world_size, "flat"))
    [(dispatched, rows)], back = through(dispatcher, x, routing, rank)
    splits = [(stage.send, stage.receive) for stage in stages(dispatched)]
    return rows, dispatched.assignments.counts_e, splits, back


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_assignment_once_and_back(world_size, request):
    results = (
        [send_and_return(0, 1)]
        if world_size == 1
        else request.getfixturevalue(f"pool{world_size}").run(send_and_return, timeout=60)
    )
    local = EXPERTS // world_size
    for rank, (rows, counts, splits, back) in enumerate(results):
        expected = []  # by expert, then by source rank, then by token
        for expert in range(rank * local, (rank + 1) * local):
            for source in range(world_size):
                expected += [
                    100 * source + t for t in range(TOKENS[source]) if expert in routing_of(source).experts_TK[t]
                ]
        assert rows[:, 0].tolist() == expected
        assert counts.sum() == len(expected)
        assert len(splits) == (world_size > 1)  # alone, nothing moves
        for send, receive in splits:
            assert sum(receive) == len(expected) and sum(send) == TOKENS[rank] * TOP_K
            assert len(send) == len(receive) == world_size
            assert [results[other][2][0][0][rank] for other in range(world_size)] == list(receive)
        routing = routing_of(rank)
        factors = (routing.gates_TK * (routing.experts_TK + 1)).sum(1, keepdim=True)
        torch.testing.assert_close(back, tags(rank) * factors, rtol=1e-14, atol=0)  # fp64, two terms


def routing_with_some_left_out(rank: int, top_k: int) -> Routing:
    generator = torch.Generator().manual_seed(10 + rank)
    tokens = TOKENS[rank]
    experts = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k, dim=1).indices
    kept = torch.rand(tokens, top_k, generator=generator) < 0.7
    gates = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    return Routing(gates, experts, torch.zeros(tokens, EXPERTS), sums_with([EXPERTS]), kept)


def send_with_some_left_out(rank, world_size, dispatch, num_chunks, top_k):
    """What was sent to whom in every stage, what arrived and what came back; some assignments are not executed."""
    routing = routing_with_some_left_out(rank, top_k)
    dispatcher = make_dispatcher(dispatch, groups_of(world_size, dispatch), num_chunks)
    chunks, back = through(dispatcher, tags(rank), routing, rank)
    count = len(stages(chunks[0][0]))
    sent = [
        [sum(stages(one)[stage].send[p] for one, _ in chunks) for p in range(world_size // count)]
        for stage in range(count)
    ]
    arrived = sum(len(one.rows_ND) for one, _ in chunks)
    assert arrived == sum(sum(stages(one)[-1].receive) for one, _ in chunks)
    kept = routing.kept_TK
    expected = tags(rank) * (routing.gates_TK * (routing.experts_TK + 1) * kept).sum(1, keepdim=True)
    return sent, back, expected


def reached(rank: int, top_k: int, size: int) -> list[set[int]]:
    """The ranges of `size` experts that each token of a rank has executed assignments in."""
    routing = routing_with_some_left_out(rank, top_k)
    return [
        {int(e) // size for e, is_kept in zip(experts, kept, strict=True) if is_kept}
        for experts, kept in zip(routing.experts_TK, routing.kept_TK, strict=True)
    ]


@pytest.mark.parametrize("num_chunks", [1, 2, 12])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_unique_sends_a_row_once_to_each_rank_with_executed_assignments(top_k, num_chunks, pool4):
    results = pool4.run(send_with_some_left_out, "unique", num_chunks, top_k, timeout=60)
    for rank, ([sent], back, expected) in enumerate(results):
        assert sent == [sum(p in to for to in reached(rank, top_k, EXPERTS // 4)) for p in range(4)]
        torch.testing.assert_close(back, expected, rtol=1e-13, atol=0)  # fp64, a few terms


@pytest.mark.parametrize("num_chunks", [1, 2, 12])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_two_level_sends_a_row_once_to_each_node_and_there_once_to_each_rank(top_k, num_chunks, pool4):
    results = pool4.run(send_with_some_left_out, "two_level", num_chunks, top_k, timeout=60)
    for rank, ([across, within], back, expected) in enumerate(results):
        assert across == [sum(node in to for to in reached(rank, top_k, EXPERTS // 2)) for node in range(2)]
        node, place = divmod(rank, 2)
        senders = [place, 2 + place]  # ranks with this rank's place, whose rows for this node come here
        here = [to for sender in senders for to in reached(sender, top_k, EXPERTS // 4)]
        assert within == [sum(2 * node + p in to for to in here) for p in range(2)]
        torch.testing.assert_close(back, expected, rtol=1e-13, atol=0)  # fp64, a few terms


def send_rounded(rank, world_size, payload):
    """Output and gradients with rows that travel in fewer bits, and with rows as they are; all of them wide."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS[rank], 64, generator=generator)
    found = []
    for name in (payload, "model"):
        rows, routing = x.clone().requires_grad_(), routing_of(rank)
        dispatcher = make_dispatcher("unique", groups_of(world_size, "unique"), 2, payload=Payload(name))
        _, back = through(dispatcher, rows, routing, rank)
        back.backward(x.cos())
        found.append((back.detach(), rows.grad))
    return found


# Each row is rounded on the way there and back: bf16 to 2**-9 of an element; e4m3 to 2**-4 of an element, and of its
# smallest ones to 2**-10 of the row's largest, which is a few times the mean.
@pytest.mark.parametrize(("payload", "least", "most"), [("bf16", 1e-4, 2 * 2**-9), ("fp8", 1e-3, 2 * 2**-4)])
def test_a_payload_of_fewer_bits_rounds_output_and_gradients(payload, least, most, pool4):
    for rounded, exact in pool4.run(send_rounded, payload, timeout=60):
        for ours, theirs in zip(rounded, exact, strict=True):
            if theirs.numel():
                apart = float((ours - theirs).norm() / theirs.norm())
                assert least < apart < most
