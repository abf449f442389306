"""One block of the decoder: norm, mixer, norm, dense SwiGLU or MoE layer.

Legend: B batch, S sequence, D hidden_size.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from moe_train.model.decode_state import KeyValue
from moe_train.model.mixers.base import Mixer, MixerContext
from moe_train.model.moe.layer import MoELayer, MoEStats


@dataclass(frozen=True)
class BlockOutput:
    """What a block hands on.

    Attributes:
        x_BSD: The residual stream.
        key_value: Keys and values of the nearest owner at or below this block.
        stats: The MoE layer's, or None for a dense block.
    """

    x_BSD: Tensor
    key_value: KeyValue | None
    stats: MoEStats | None


class Block(nn.Module):
    """pre: x + F(N(x)); post: N(x + F(x)); for the mixer, then for the feed-forward layer."""

    def __init__(
        self,
        mixer: Mixer,
        feed_forward: nn.Module,
        mixer_norm: nn.Module,
        feed_forward_norm: nn.Module,
        norm_position: Literal["pre", "post"],
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.is_pre_norm = norm_position == "pre"

    def forward(self, x_BSD: Tensor, context: MixerContext) -> BlockOutput:
        """The next residual stream.

        Args:
            x_BSD: Residual stream.
            context: The block's surroundings; its key_value are those of the owner below.

        Collective: All ranks of the expert-parallel group, where the block has an MoE layer.
        """
        inner_BSD = self.mixer_norm(x_BSD) if self.is_pre_norm else x_BSD
        context = context.with_key_value(self.mixer.publish(inner_BSD, context))
        x_BSD = x_BSD + self.mixer(inner_BSD, context)
        if not self.is_pre_norm:
            x_BSD = self.mixer_norm(x_BSD)

        inner_BSD = self.feed_forward_norm(x_BSD) if self.is_pre_norm else x_BSD
        stats = None
        if isinstance(self.feed_forward, MoELayer):
            update_BSD, stats = self.feed_forward(inner_BSD, context.token_keys_BS)
        else:
            update_BSD = self.feed_forward(inner_BSD)
        x_BSD = x_BSD + update_BSD
        if not self.is_pre_norm:
            x_BSD = self.feed_forward_norm(x_BSD)
        return BlockOutput(x_BSD, context.key_value, stats)
