"""The Mixture-of-Experts layer: route -> dispatch -> experts -> combine.

Legend: B batch, S sequence, T = B*S tokens, D hidden_size, e experts of this rank.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.profiler import record_function

from moe_train.model.layers import SwiGLU
from moe_train.model.moe.capacity import CapacityLimit
from moe_train.model.moe.dispatch import Dispatcher
from moe_train.model.moe.experts import GroupedExperts
from moe_train.model.moe.routers.base import Router
from moe_train.model.moe.steps import RoutingSums
from moe_train.parallel.collectives import Group


@dataclass(frozen=True)
class MoEStats:
    """What an MoE layer tells about one micro-batch of this rank.

    Attributes:
        sums: Sums over its tokens.
    """

    sums: RoutingSums


class MoELayer(nn.Module):
    """A sparse feed-forward layer: every token passes K of E experts, which are spread over the ranks of a group."""

    def __init__(
        self,
        router: Router,
        dispatcher: Dispatcher,
        experts: GroupedExperts,
        num_experts: int,
        group: Group | None,
        capacity: CapacityLimit | None = None,
        shared: SwiGLU | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher, self.num_experts, self.group = dispatcher, num_experts, group
        self.capacity = capacity

    def forward(self, x_BSD: Tensor, token_keys_BS: Tensor) -> tuple[Tensor, MoEStats]:
        """The layer's output, [B, S, D], and its statistics.

        Args:
            x_BSD: Normalised hidden states.
            token_keys_BS: int64 random key of each token.

        Collective: All ranks of the group.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])  # (B, S, D) -> (T, D)
        num_sequences = x_BSD.shape[0]
        with record_function("moe/route"):
            routing = self.router(x_TD, token_keys_BS.reshape(-1), num_sequences)
            if self.capacity is not None:
                routing = self.capacity.apply(routing, num_sequences, self.training)
        with record_function("moe/dispatch"):
            dispatched = self.dispatcher.dispatch(x_TD, routing, self.num_experts, self.group)
        with record_function("moe/experts"):
            rows_ND = self.experts(dispatched.rows_ND, dispatched.assignments)
        with record_function("moe/combine"):
            y_TD = self.dispatcher.combine(rows_ND, dispatched, self.group)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        rows = routing.sums.counts.new_full((), dispatched.assignments.num_assignments)
        return y_TD.view_as(x_BSD), MoEStats(replace(routing.sums, rows=rows))
