"""Interface of feed-forward layers, dense or with experts; description of the dense ones, and the dense SwiGLU.

Legend: B batch, S sequence, D hidden_size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.model.cost import Elementwise, FeedForwardCost, Product
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


@dataclass(frozen=True)
class FeedForwardSpec:
    """Settings that a dense feed-forward layer is built from.

    Attributes:
        model: Model section of the configuration.
        layer: Index of the block, from 0.
        output_std: Standard deviation of initial weights that write to the residual stream.
    """

    model: ModelConfig
    layer: int
    output_std: float


@dataclass(frozen=True)
class FeedForwardKind:
    """Description of a kind of dense feed-forward layer, for model and planner.

    Attributes:
        build: Function that makes the layer.
        cost: Function that gives its cost.
        state_bytes: Function that gives the bytes of a sequence's decode state, from the spec and the bytes per element
            of the model.
        takes_hidden_copies: Whether the layer works on a stream with hidden copies: it computes each token alone.
        takes_sequence_parts: Whether the layer works on a rank's part of a sequence (`MixerContext.shard`).
    """

    build: Callable[[FeedForwardSpec], FeedForward]
    cost: Callable[[FeedForwardSpec], FeedForwardCost]
    state_bytes: Callable[[FeedForwardSpec, int], int] = lambda spec, element_bytes: 0
    takes_hidden_copies: bool = False
    takes_sequence_parts: bool = False


def _build(spec: FeedForwardSpec) -> DenseSwiGLU:
    model = spec.model
    return DenseSwiGLU(model.hidden_size, model.intermediate_size, model.init_std, spec.output_std)


def _cost(spec: FeedForwardSpec) -> FeedForwardCost:
    hidden, inner = spec.model.hidden_size, spec.model.intermediate_size
    return FeedForwardCost(
        products=(Product(hidden, 2 * inner), Product(inner, hidden)),
        kept=hidden + 3 * inner,
        work=5 * inner,
        elementwise=(Elementwise(inner, forward=20, backward=52, is_narrow=True),),
    )


SWIGLU = FeedForwardKind(_build, _cost, takes_hidden_copies=True, takes_sequence_parts=True)
