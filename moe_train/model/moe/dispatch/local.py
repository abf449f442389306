"""Local dispatch, if all experts are on this rank: nothing travels.

Legend: T tokens of this rank, D hidden_size.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_train.model.moe.dispatch.base import Dispatched, assignments_of
from moe_train.model.moe.steps import Routing
from moe_train.ops.pending import Pending, start_host_copy


@dataclass(frozen=True)
class LocalDispatcher:
    """A dispatcher that leaves all tokens in place, as one chunk."""

    def plan(self, x_TD: Tensor, routing: Routing) -> list[Dispatched]:
        assignments = assignments_of(routing)
        if routing.kept_TK is not None:
            # Host synchronisation: the experts need to know how many assignments are left.
            [num_executed] = start_host_copy([assignments.counts_e.sum()]).wait()
            assignments = assignments.first(num_executed)
        return [Dispatched(x_TD, assignments, None)]

    def start(self, chunk: Dispatched) -> Pending[Dispatched]:
        return Pending(lambda: chunk)

    def start_combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        del dispatched
        return Pending(lambda: rows_ND)
