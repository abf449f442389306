"""One block of the decoder: norm, mixer, norm, feed-forward layer.

Legend: B batch, S sequence, D hidden_size.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from moe_train.model.decode_state import LayerStates
from moe_train.model.feed_forward import FeedForward
from moe_train.model.mixers.base import Mixer, MixerContext, Shared
from moe_train.model.moe.steps import RoutingSums

NO_STATES = LayerStates()


@dataclass(frozen=True)
class BlockOutput:
    """Output of a block.

    Attributes:
        x_BSD: Residual stream after the block.
        shared: Tensors that this layer and those below hand up to the layers above.
        sums: Routing sums of the MoE layer; None for a dense block.
    """

    x_BSD: Tensor
    shared: Shared
    sums: RoutingSums | None


class Block(nn.Module):
    """A block of the decoder: x + F(N(x)) (pre) or N(x + F(x)) (post), for F = mixer, then F = feed-forward layer."""

    def __init__(
        self,
        mixer: Mixer,
        feed_forward: FeedForward,
        mixer_norm: nn.Module,
        feed_forward_norm: nn.Module,
        norm_position: Literal["pre", "post"],
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.is_pre_norm = norm_position == "pre"

    def forward(self, x_BSD: Tensor, context: MixerContext, states: LayerStates = NO_STATES) -> BlockOutput:
        """Compute the next residual stream.

        Args:
            x_BSD: Residual stream before the block.
            context: Context of the block; its `shared` has what the layers below have handed up.
            states: States of this layer while decoding.

        Collective: All ranks of the expert-parallel group, if the block has an MoE layer.
        """
        inner_BSD = self.mixer_norm(x_BSD) if self.is_pre_norm else x_BSD
        mixed_BSD, shared = self.mixer(inner_BSD, replace(context, state=states.mixer))
        x_BSD = x_BSD + mixed_BSD
        if not self.is_pre_norm:
            x_BSD = self.mixer_norm(x_BSD)

        inner_BSD = self.feed_forward_norm(x_BSD) if self.is_pre_norm else x_BSD
        update_BSD, sums = self.feed_forward(inner_BSD, replace(context, state=states.feed_forward))
        x_BSD = x_BSD + update_BSD
        if not self.is_pre_norm:
            x_BSD = self.feed_forward_norm(x_BSD)
        return BlockOutput(x_BSD, shared, sums)
