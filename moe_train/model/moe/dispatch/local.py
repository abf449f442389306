"""Local dispatch, if all experts are on this rank: nothing travels.

Legend: T tokens of this rank, D hidden_size.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_train.model.moe.dispatch.base import Dispatched, ExpertOrder
from moe_train.model.moe.steps import Routing
from moe_train.ops.host_copy import HostCopy


@dataclass(frozen=True)
class Here:
    """Rows that are at their experts already."""

    dispatched: Dispatched

    def wait(self) -> Dispatched:
        return self.dispatched


@dataclass(frozen=True)
class Done:
    """Outputs that are at their tokens already."""

    rows_TD: Tensor

    def wait(self) -> Tensor:
        return self.rows_TD


@dataclass(frozen=True)
class LocalDispatcher:
    """A dispatcher that leaves all tokens in place, as one chunk."""

    def plan(self, x_TD: Tensor, routing: Routing) -> list[Dispatched]:
        order = ExpertOrder.of(routing)
        num_executed = order.order_A.shape[0]
        if routing.kept_TK is not None:
            # Host synchronisation: the experts need to know how many assignments are left.
            [num_executed] = HostCopy([order.counts_E.sum()]).read()
        return [Dispatched(x_TD, order.assignments().first(int(num_executed)), None)]

    def start(self, chunk: Dispatched) -> Here:
        return Here(chunk)

    def start_combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Done:
        del dispatched
        return Done(rows_ND)
