"""The Mixture-of-Experts layer: route -> dispatch -> experts -> combine.

Legend: B batch, S sequence, T = B*S tokens, D hidden_size.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moe_train.model.moe.dispatch import Dispatcher
from moe_train.model.moe.experts import GroupedExperts
from moe_train.model.moe.routers.base import Router
from moe_train.model.moe.steps import RoutingSums
from moe_train.parallel.collectives import Group


@dataclass(frozen=True)
class MoEStats:
    """What an MoE layer tells about one micro-batch of this rank.

    Attributes:
        sums: Sums over its tokens, [E] each.
    """

    sums: RoutingSums


class MoELayer(nn.Module):
    """A sparse feed-forward layer: every token passes K of E experts, which are spread over the ranks of a group."""

    def __init__(
        self, router: Router, dispatcher: Dispatcher, experts: GroupedExperts, num_experts: int, group: Group | None
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.dispatcher, self.num_experts, self.group = dispatcher, num_experts, group

    def forward(self, x_BSD: Tensor, token_keys_BS: Tensor) -> tuple[Tensor, MoEStats]:
        """The layer's output, [B, S, D], and its statistics.

        Args:
            x_BSD: Normalised hidden states.
            token_keys_BS: int64 random key of each token.

        Collective: All ranks of the group.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])  # (B, S, D) -> (T, D)
        routing = self.router(x_TD, token_keys_BS.reshape(-1))
        dispatched = self.dispatcher.dispatch(x_TD, routing, self.num_experts, self.group)
        rows_RD = self.experts(dispatched.rows_RD, dispatched.counts_e)
        y_TD = self.dispatcher.combine(rows_RD, dispatched, self.group)
        return y_TD.view_as(x_BSD), MoEStats(routing.sums)
