"""The Mixture-of-Experts layer: route -> dispatch -> experts -> combine.

Legend: B batch, S sequence, T = B*S tokens, D hidden_size, e experts of this rank.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from moe_train.model.layers import SwiGLU
from moe_train.model.moe.capacity import CapacityLimit
from moe_train.model.moe.dispatch import Departed, Dispatcher, Path
from moe_train.model.moe.experts import GroupedExperts
from moe_train.model.moe.routers.base import Router
from moe_train.model.moe.steps import Routing, RoutingSums


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
        path: Path = (),
        capacity: CapacityLimit | None = None,
        shared: SwiGLU | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher, self.num_experts, self.path = dispatcher, num_experts, path
        self.capacity = capacity

    def forward(self, x_BSD: Tensor, token_keys_BS: Tensor) -> tuple[Tensor, MoEStats]:
        """The layer's output, [B, S, D], and its statistics.

        Args:
            x_BSD: Normalised hidden states.
            token_keys_BS: int64 random key of each token.

        Collective: All ranks of the groups on the path to the experts.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])  # (B, S, D) -> (T, D)
        num_sequences = x_BSD.shape[0]
        with record_function("moe/route"):
            routing = self.router(x_TD, token_keys_BS.reshape(-1), num_sequences)
            if self.capacity is not None:
                routing = self.capacity.apply(routing, num_sequences, self.training)
        y_TD, num_assignments = self._through_experts(x_TD, routing)
        rows = routing.sums.counts.new_full((), num_assignments)
        return y_TD.view_as(x_BSD), MoEStats(replace(routing.sums, rows=rows))

    def _through_experts(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, int]:
        """The layer's output, and how many assignments this rank's experts computed.

        A chunk travels while the shared experts, or the experts of the chunk before it, are computed. The backward pass
        waits and starts in the mirrored order (see moe_train/distributed/all_to_all.py).
        """
        with record_function("moe/dispatch"):
            first, *later = self.dispatcher.plan(x_TD, routing, self.num_experts, self.path)
            departed: Departed | None = self.dispatcher.send(first)
        shared_TD = None if self.shared is None else self.shared(x_TD)
        outputs, returning, num_assignments = [], None, 0
        while departed is not None:
            with record_function("moe/dispatch"):
                dispatched = self.dispatcher.arrive(departed)
                departed = self.dispatcher.send(later.pop(0)) if later else None
            with record_function("moe/experts"):
                rows_ND = self.experts(dispatched.rows_ND, dispatched.assignments)
            with record_function("moe/combine"):
                before, returning = returning, self.dispatcher.combine(rows_ND, dispatched)
                if before is not None:
                    outputs.append(self.dispatcher.finish(before))
            num_assignments += dispatched.assignments.num_assignments
        with record_function("moe/combine"):
            assert returning is not None, "there is at least one chunk"
            outputs.append(self.dispatcher.finish(returning))
            y_TD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return y_TD if shared_TD is None else y_TD + shared_TD, num_assignments
