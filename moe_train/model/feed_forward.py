"""Interface of feed-forward layers, dense or with experts, and the dense SwiGLU.

Legend: B batch, S sequence, D hidden_size.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from moe_train.model.decode_state import CacheSpec, DecodeState
from moe_train.model.layers import SwiGLU
from moe_train.model.mixers.base import MixerContext
from moe_train.model.moe.steps import RoutingSums


class FeedForward(nn.Module, ABC):
    """The second layer of a block. Most compute each token alone; one that looks back has a state while decoding."""

    @abstractmethod
    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, RoutingSums | None]:
        """Transform the hidden states.

        Args:
            x_BSD: Normalised hidden states.
            context: Context of the layer.

        Returns:
            The update of the residual stream [B, S, D], and the routing sums; None if nothing is routed.

        Collective: All ranks that share the layer's experts, if it has any.
        """

    def new_state(self, spec: CacheSpec) -> DecodeState | None:
        """Make an empty state for decoding; None: this layer remembers nothing."""
        del spec
        return None


class DenseSwiGLU(SwiGLU, FeedForward):
    """The dense SwiGLU, which every token passes."""

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, None]:  # type: ignore[override]
        del context
        return super().forward(x_BSD), None
