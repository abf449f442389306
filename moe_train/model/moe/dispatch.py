"""Bringing token rows to their experts, on other ranks too, and the experts' outputs back.

flat: one row an assignment that is executed, in one all-to-all of uneven splits each way.
unique: one row for each rank that a token has experts on, however many; back comes their weighted sum.
Legend: T tokens of this rank, K top_k, A = T*K assignments, Q rows sent, N rows received, S assignments sent, R those
of this rank's experts, D hidden_size, E experts, e of a rank, P ranks of the group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_train.model.moe.steps import Assignments, Dispatched, Routing
from moe_train.ops.permute import invert_order, sort_assignments
from moe_train.ops.row_map import RowMap, spread, sum_places
from moe_train.parallel.collectives import Group, all_to_all_counts, all_to_all_rows, group_size
from moe_train.parallel.probe import Probe


class Dispatcher(Protocol):
    """A way for tokens to reach experts. Every rank of the group must call both, also with rows for nobody."""

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int, group: Group | None) -> Dispatched:
        """Rows at their experts."""

    def combine(self, rows_ND: Tensor, dispatched: Dispatched, group: Group | None) -> Tensor:
        """The sum of each token's weighted expert outputs, [T, D]."""


@dataclass(frozen=True)
class FlatDispatcher:
    """One row an assignment.

    Attributes:
        probe: Told of the layer's all-to-alls; None: nobody asks.
    """

    probe: Probe | None = None

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int, group: Group | None) -> Dispatched:
        """Send each token's row once to each of its K experts that has room for it, and its gate with it.

        Args:
            x_TD: Token rows of this rank.
            routing: The router's decision.
            num_experts: E; rank i of the group holds experts i*e .. (i+1)*e - 1.
            group: Ranks that share the experts; None: all are here, and no row moves.

        Collective: All ranks of the group.
        """
        order_A, counts_E = sort_assignments(routing.experts_TK, num_experts, routing.kept_TK)
        sent_Pe = counts_E.view(group_size(group), -1)  # (E) -> (ranks, e)
        received_Pe = all_to_all_counts(sent_Pe, group, self.probe)
        if group is None and routing.kept_TK is None:
            send = receive = (order_A.shape[0],)  # known without looking
        else:
            # Host synchronisation: the only one; the all-to-all needs its split sizes as numbers, and the experts how
            # many rows are left where there is a capacity.
            send, receive = (tuple(row) for row in torch.stack((sent_Pe.sum(1), received_Pe.sum(1))).tolist())
        order_Q = order_A[: sum(send)]
        tokens = _token_map(order_Q, *routing.experts_TK.shape)
        gates_Q = routing.gates_TK.reshape(-1).gather(0, order_Q)
        if group is None:
            return Dispatched(x_TD, Assignments(tokens, gates_Q, counts_E))
        rows_ND = all_to_all_rows(spread(x_TD, tokens), send, receive, group, self.probe)
        gates_N = all_to_all_rows(gates_Q.unsqueeze(1), send, receive, group, self.probe).squeeze(1)
        order_R = _order_by_local_expert(received_Pe, sum(receive))
        places = RowMap.of_order(order_R, invert_order(order_R), copies=1)
        assignments = Assignments(places, gates_N.gather(0, order_R), received_Pe.sum(0))
        return Dispatched(rows_ND, assignments, tokens, send, receive)

    def combine(self, rows_ND: Tensor, dispatched: Dispatched, group: Group | None) -> Tensor:
        """Send the experts' weighted outputs back and add each token's.

        Args:
            rows_ND: Expert outputs, in the order of dispatched.rows_ND.
            dispatched: From `dispatch`.
            group: As in `dispatch`.

        Returns:
            [T, D].

        Collective: All ranks of the group.
        """
        if dispatched.sent is None:
            return rows_ND
        rows_QD = all_to_all_rows(rows_ND, dispatched.receive, dispatched.send, group, self.probe)
        return sum_places(rows_QD, dispatched.sent)


@dataclass(frozen=True)
class UniqueDispatcher(FlatDispatcher):
    """One row for each rank that a token goes to: of K experts on P ranks, P (1 - C(E-e, K)/C(E, K)) in the mean.

    Which expert takes which row, and with which gate, travels beside the rows: 8 bytes an assignment.
    """

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int, group: Group | None) -> Dispatched:
        """As FlatDispatcher's, with fewer rows. Collective: all ranks of the group."""
        if group is None:
            return super().dispatch(x_TD, routing, num_experts, group)
        num_ranks, num_tokens = group_size(group), x_TD.shape[0]
        order_A, counts_E = sort_assignments(routing.experts_TK, num_experts, routing.kept_TK)
        is_sent_PT = _ranks_of_tokens(routing, num_experts, num_ranks)
        counts_Pe = counts_E.view(num_ranks, -1)  # (E) -> (P, e)
        told = all_to_all_counts(torch.cat((is_sent_PT.sum(1, keepdim=True), counts_Pe), 1), group, self.probe)
        rows_P, received_Pe = told[:, 0], told[:, 1:]
        splits = torch.stack((is_sent_PT.sum(1), rows_P, counts_Pe.sum(1), received_Pe.sum(1)))
        # Host synchronisation: the only one; the all-to-alls need their split sizes as numbers.
        send, receive, send_S, receive_R = (tuple(row) for row in splits.tolist())
        # The rows in order of their rank, then token: numbers p*T + t. Those that are not sent stand behind the others.
        numbers_Q = torch.argsort((~is_sent_PT).flatten().to(torch.uint8), stable=True)[: sum(send)]
        tokens = RowMap.of(numbers_Q % max(num_tokens, 1), num_tokens)
        rows_ND = all_to_all_rows(spread(x_TD, tokens), send, receive, group, self.probe)
        order_S = order_A[: sum(send_S)]
        gates_S = routing.gates_TK.reshape(-1).gather(0, order_S)
        gates_R = all_to_all_rows(gates_S.unsqueeze(1), send_S, receive_R, group, self.probe).squeeze(1)
        places_S = _places_in_blocks(is_sent_PT, routing.experts_TK, order_S, num_experts)
        places_R = all_to_all_rows(places_S.unsqueeze(1), send_S, receive_R, group, self.probe).squeeze(1)
        starts_P = rows_P.cumsum(0) - rows_P
        source_R = places_R + starts_P.repeat_interleave(received_Pe.sum(1), output_size=sum(receive_R))
        order_R = _order_by_local_expert(received_Pe, sum(receive_R))
        places = RowMap.of(source_R.gather(0, order_R), sum(receive))
        assignments = Assignments(places, gates_R.gather(0, order_R), received_Pe.sum(0))
        return Dispatched(rows_ND, assignments, tokens, send, receive)


DISPATCHERS: dict[str, Callable[[Probe | None], Dispatcher]] = {"flat": FlatDispatcher, "unique": UniqueDispatcher}


def _ranks_of_tokens(routing: Routing, num_experts: int, num_ranks: int) -> Tensor:
    """Which ranks each token has executed assignments on. bool [P, T]."""
    rank_TK = routing.experts_TK // (num_experts // num_ranks)
    if routing.kept_TK is not None:
        rank_TK = rank_TK.masked_fill(~routing.kept_TK, num_ranks)
    is_sent_TP = torch.zeros(rank_TK.shape[0], num_ranks + 1, dtype=torch.bool, device=rank_TK.device)
    return is_sent_TP.scatter_(1, rank_TK, True)[:, :num_ranks].t()


def _places_in_blocks(is_sent_PT: Tensor, experts_TK: Tensor, order_S: Tensor, num_experts: int) -> Tensor:
    """Which of the rows that go to its rank each assignment is of, counted from 0 for every rank. int32 [S]."""
    num_ranks, top_k = is_sent_PT.shape[0], experts_TK.shape[1]
    place_PT = is_sent_PT.cumsum(1) - 1
    rank_S = experts_TK.reshape(-1).gather(0, order_S) // (num_experts // num_ranks)
    return place_PT[rank_S, order_S // top_k].to(torch.int32)


def _order_by_local_expert(received_Pe: Tensor, num_rows: int) -> Tensor:
    """Order that groups rows by local expert when they arrived by source rank, then by local expert. int64 [R]."""
    experts_Pe = torch.arange(received_Pe.shape[1], device=received_Pe.device).expand_as(received_Pe)
    # output_size spares repeat_interleave a host synchronisation.
    expert_of_row_R = experts_Pe.reshape(-1).repeat_interleave(received_Pe.reshape(-1), output_size=num_rows)
    return torch.argsort(expert_of_row_R, stable=True)


def _token_map(order_Q: Tensor, num_tokens: int, top_k: int) -> RowMap:
    """The token of every executed assignment, in expert order."""
    if order_Q.shape[0] == num_tokens * top_k:
        return RowMap.of_order(order_Q, invert_order(order_Q), top_k)
    return RowMap.of(order_Q // top_k, num_tokens)
