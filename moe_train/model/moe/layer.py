"""The Mixture-of-Experts layer: route -> dispatch -> experts -> combine.

Legend: B batch, S sequence, T = B*S tokens, D hidden_size.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import record_function

from moe_train.model.feed_forward import FeedForward
from moe_train.model.layers import SwiGLU
from moe_train.model.mixers.base import MixerContext
from moe_train.model.moe.capacity import NO_LIMIT, CapacityLimit
from moe_train.model.moe.dispatch.base import Dispatcher
from moe_train.model.moe.experts import GroupedExperts
from moe_train.model.moe.routers.base import Router
from moe_train.model.moe.steps import RoutingSums
from moe_train.ops.pending import Pending


class MoELayer(FeedForward):
    """A sparse feed-forward layer: every token passes K of E experts, which are spread over the ranks of a group."""

    def __init__(
        self,
        router: Router,
        dispatcher: Dispatcher,
        experts: GroupedExperts,
        capacity: CapacityLimit = NO_LIMIT,
        shared: SwiGLU | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher, self.capacity = dispatcher, capacity

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, RoutingSums]:
        """Compute the layer's output [B, S, D], and the routing sums of its tokens.

        A chunk travels while the shared experts, or the experts of the chunk before it, compute.

        Collective: All ranks of the dispatcher's groups, and those that share the sequences.
        """
        x_TD, num_sequences = x_BSD.flatten(0, 1), x_BSD.shape[0]  # (B, S, D) -> (T, D)
        with record_function("moe/route"):
            group = None if context.shard is None else context.shard.ranks.group
            routing = self.router(x_TD, context.tokens.keys_BS.flatten(), num_sequences, group)
            routing = self.capacity.apply(routing, num_sequences, self.training)
        with record_function("moe/dispatch"):
            first, *later = self.dispatcher.plan(x_TD, routing)
            pending = self.dispatcher.start(first)
        shared_TD = None if self.shared is None else self.shared(x_TD)
        outputs: list[Tensor] = []
        returning: list[Pending[Tensor]] = []
        num_assignments = 0
        for following in [*later, None]:
            with record_function("moe/dispatch"):
                dispatched = pending.wait()
                if following is not None:
                    pending = self.dispatcher.start(following)
            with record_function("moe/experts"):
                rows_ND = self.experts(dispatched.rows_ND, dispatched.assignments)
            with record_function("moe/combine"):
                returning.append(self.dispatcher.start_combine(rows_ND, dispatched))
                if len(returning) > 1:
                    outputs.append(returning.pop(0).wait())
            num_assignments += dispatched.assignments.num_assignments
        with record_function("moe/combine"):
            outputs.append(returning.pop().wait())
            y_TD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        y_TD = y_TD if shared_TD is None else y_TD + shared_TD
        rows = routing.sums.counts.new_full((), num_assignments)
        return y_TD.view_as(x_BSD), replace(routing.sums, rows=rows)
