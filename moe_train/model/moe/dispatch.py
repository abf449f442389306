"""Bringing token rows to their experts, on other ranks too, and the experts' outputs back.

flat: one row an assignment that is executed, in one all-to-all of uneven splits each way.
Legend: T tokens of this rank, K top_k, A = T*K assignments, Q rows sent, R rows received, D hidden_size, E experts,
e of a rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_train.model.moe.steps import Dispatched, Routing
from moe_train.ops.permute import expand_rows, gather_rows, invert_order, sort_assignments, weighted_sum
from moe_train.parallel.collectives import Group, all_to_all_counts, all_to_all_rows, group_size
from moe_train.parallel.probe import Probe


class Dispatcher(Protocol):
    """A way for tokens to reach experts. Every rank of the group must call both, also with rows for nobody."""

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int, group: Group | None) -> Dispatched:
        """Rows at their experts."""

    def combine(self, rows_RD: Tensor, dispatched: Dispatched, group: Group | None) -> Tensor:
        """The gate-weighted sum of each token's expert outputs, [T, D]."""


@dataclass(frozen=True)
class FlatDispatcher:
    """One row an assignment.

    Attributes:
        probe: Told of the layer's all-to-alls; None: nobody asks.
    """

    probe: Probe | None = None

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int, group: Group | None) -> Dispatched:
        """Send each token's row once to each of its K experts that has room for it.

        Args:
            x_TD: Token rows of this rank.
            routing: The router's decision.
            num_experts: E; rank i of the group holds experts i*e .. (i+1)*e - 1.
            group: Ranks that share the experts; None: all are here.

        Collective: All ranks of the group.
        """
        num_assignments, top_k = routing.experts_TK.numel(), routing.experts_TK.shape[1]
        order_A, counts_E = sort_assignments(routing.experts_TK, num_experts, routing.kept_TK)
        sent_Pe = counts_E.view(group_size(group), -1)  # (E) -> (ranks, e)
        received_Pe = all_to_all_counts(sent_Pe, group, self.probe)
        if group is None and routing.kept_TK is None:
            send = receive = (num_assignments,)  # known without looking
        else:
            # Host synchronisation: the only one; the all-to-all needs its split sizes as numbers, and the experts how
            # many rows are left where there is a capacity.
            send, receive = (tuple(row) for row in torch.stack((sent_Pe.sum(1), received_Pe.sum(1))).tolist())
        order_Q = order_A[: sum(send)]
        inverse_A = invert_order(order_Q, num_assignments)
        rows_RD = all_to_all_rows(expand_rows(x_TD, order_Q, inverse_A, top_k), send, receive, group, self.probe)
        regroup_R = regroup_inverse_R = None
        if group is not None:
            regroup_R = _order_by_local_expert(received_Pe, sum(receive))
            regroup_inverse_R = invert_order(regroup_R)
            rows_RD = gather_rows(rows_RD, regroup_R, regroup_inverse_R)
        return Dispatched(
            rows_RD=rows_RD,
            counts_e=received_Pe.sum(0),
            gates_TK=routing.gates_TK,
            order_Q=order_Q,
            inverse_A=inverse_A,
            regroup_R=regroup_R,
            regroup_inverse_R=regroup_inverse_R,
            send=send,
            receive=receive,
        )

    def combine(self, rows_RD: Tensor, dispatched: Dispatched, group: Group | None) -> Tensor:
        """Send the experts' outputs back and add each token's, weighted by its gates.

        Args:
            rows_RD: Expert outputs, in the order of dispatched.rows_RD.
            dispatched: From `dispatch`.
            group: As in `dispatch`.

        Returns:
            [T, D].

        Collective: All ranks of the group.
        """
        if dispatched.regroup_R is not None and dispatched.regroup_inverse_R is not None:
            rows_RD = gather_rows(rows_RD, dispatched.regroup_inverse_R, dispatched.regroup_R)
        rows_QD = all_to_all_rows(rows_RD, dispatched.receive, dispatched.send, group, self.probe)
        return weighted_sum(rows_QD, dispatched.gates_TK, dispatched.inverse_A, dispatched.order_Q)


DISPATCHERS: dict[str, Callable[[Probe | None], Dispatcher]] = {"flat": FlatDispatcher}


def _order_by_local_expert(received_Pe: Tensor, num_rows: int) -> Tensor:
    """Order that groups rows by local expert when they arrived by source rank, then by local expert. int64 [R]."""
    experts_Pe = torch.arange(received_Pe.shape[1], device=received_Pe.device).expand_as(received_Pe)
    # output_size spares repeat_interleave a host synchronisation.
    expert_of_row_R = experts_Pe.reshape(-1).repeat_interleave(received_Pe.reshape(-1), output_size=num_rows)
    return torch.argsort(expert_of_row_R, stable=True)
