"""Bringing token rows to their experts, on other ranks too, and the experts' outputs back.

flat: one row an assignment that is executed, in one all-to-all of uneven splits each way.
Legend: T tokens of this rank, K top_k, A = T*K assignments, Q rows sent, N rows received, R assignments of this rank's
experts, D hidden_size, E experts, e of a rank.
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


DISPATCHERS: dict[str, Callable[[Probe | None], Dispatcher]] = {"flat": FlatDispatcher}


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
