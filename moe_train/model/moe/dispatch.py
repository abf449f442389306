"""Bringing token rows to their experts, on other ranks too, and the experts' outputs back.

flat: one row an assignment, in one all-to-all of uneven splits each way. Dropless.
Legend: T tokens of this rank, K top_k, A = T*K assignments, R rows received, D hidden_size, E experts, e of a rank.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_train.model.moe.steps import Dispatched, Routing
from moe_train.ops.permute import expand_rows, invert_permutation, permute_rows, sort_assignments, weighted_sum
from moe_train.parallel.collectives import Group, all_to_all_counts, all_to_all_rows, group_size


class Dispatcher(Protocol):
    """A way for tokens to reach experts. Every rank of the group must call both, also with rows for nobody."""

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int, group: Group | None) -> Dispatched:
        """Rows at their experts."""

    def combine(self, rows_RD: Tensor, dispatched: Dispatched, group: Group | None) -> Tensor:
        """The gate-weighted sum of each token's expert outputs, [T, D]."""


@dataclass(frozen=True)
class FlatDispatcher:
    """One row an assignment."""

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int, group: Group | None) -> Dispatched:
        """Send each token's row once to each of its K experts.

        Args:
            x_TD: Token rows of this rank.
            routing: The router's decision.
            num_experts: E; rank i of the group holds experts i*e .. (i+1)*e - 1.
            group: Ranks that share the experts; None: all are here.

        Collective: All ranks of the group.
        """
        top_k = routing.experts_TK.shape[1]
        order_A, counts_E = sort_assignments(routing.experts_TK, num_experts)
        inverse_A = invert_permutation(order_A)
        rows_AD = expand_rows(x_TD, order_A, inverse_A, top_k)
        if group is None:
            whole = (rows_AD.shape[0],)
            return Dispatched(rows_AD, counts_E, routing.gates_TK, order_A, inverse_A, None, None, whole, whole)
        ranks = group_size(group)
        sent_Pe = counts_E.view(ranks, -1)  # (E) -> (ranks, e)
        received_Pe = all_to_all_counts(sent_Pe, group)
        # Host synchronisation: the only one; the all-to-all needs its split sizes as numbers.
        send, receive = torch.stack((sent_Pe.sum(1), received_Pe.sum(1))).tolist()
        arrived_RD = all_to_all_rows(rows_AD, send, receive, group)
        regroup_R = _order_by_local_expert(received_Pe, sum(receive))
        regroup_inverse_R = invert_permutation(regroup_R)
        return Dispatched(
            rows_RD=permute_rows(arrived_RD, regroup_R, regroup_inverse_R),
            counts_e=received_Pe.sum(0),
            gates_TK=routing.gates_TK,
            order_A=order_A,
            inverse_A=inverse_A,
            regroup_R=regroup_R,
            regroup_inverse_R=regroup_inverse_R,
            send=tuple(send),
            receive=tuple(receive),
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
            rows_RD = permute_rows(rows_RD, dispatched.regroup_inverse_R, dispatched.regroup_R)
        rows_AD = all_to_all_rows(rows_RD, dispatched.receive, dispatched.send, group)
        return weighted_sum(rows_AD, dispatched.gates_TK, dispatched.inverse_A, dispatched.order_A)


DISPATCHERS: dict[str, Dispatcher] = {"flat": FlatDispatcher()}


def _order_by_local_expert(received_Pe: Tensor, num_rows: int) -> Tensor:
    """Order that groups rows by local expert when they arrived by source rank, then by local expert. int64 [R]."""
    experts_Pe = torch.arange(received_Pe.shape[1], device=received_Pe.device).expand_as(received_Pe)
    # output_size spares repeat_interleave a host synchronisation.
    expert_of_row_R = experts_Pe.reshape(-1).repeat_interleave(received_Pe.reshape(-1), output_size=num_rows)
    return torch.argsort(expert_of_row_R, stable=True)
