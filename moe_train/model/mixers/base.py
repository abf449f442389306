"""The interface of sequence mixers: whatever mixes tokens along the sequence.

Legend: B batch, S sequence, D hidden_size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moe_train.config.base import Section
from moe_train.config.model import ModelConfig
from moe_train.model.cost import MixerCost
from moe_train.model.decode_state import CacheSpec, DecodeState
from moe_train.model.token_index import TokenIndex
from moe_train.ops.rotary import rotary_angles

Shared = dict[str, Tensor]
"""Tensors that layers hand up to those above, by name: MLKV's keys and values, RWKV-7's first values."""


@dataclass(frozen=True)
class MixerContext:
    """What a block's mixer and feed-forward layer know of their surroundings.

    Attributes:
        layer: Index of the block, from 0.
        tokens: Which token each row is.
        shared: What the layers below have handed up; empty below the first.
        state: This mixer's (or feed-forward layer's) state while decoding; None: there is none.
        formed: What layers have formed of the positions so far in this forward pass.
    """

    layer: int
    tokens: TokenIndex
    shared: Shared = field(default_factory=dict)
    state: Any = None
    formed: dict[Any, Any] = field(default_factory=dict, compare=False)

    def rotary_angles(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """`ops.rotary.rotary_angles` of these positions, formed once for all layers that rotate alike."""
        known = self.formed.get((head_dim, theta))
        if known is None or known[0] is not self.tokens.positions_BS:  # a hook may have put others in their place
            known = (self.tokens.positions_BS, *rotary_angles(self.tokens.positions_BS, head_dim, theta))
            self.formed[head_dim, theta] = known
        return known[1], known[2]


class Mixer(nn.Module, ABC):
    """Mixes along the sequence. It is causal, and streams: any split of a sequence gives the same outputs."""

    @abstractmethod
    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        """Mix S new tokens, starting from the state if there is one.

        Args:
            x_BSD: Normalised hidden states.
            context: Surroundings.

        Returns:
            The mixed sequence [B, S, D], and what the layers above are to see: context.shared, with this layer's own.
            It goes up as explicit tensors, so that activation recomputation and ZeRO's hooks see it.
        """

    def new_state(self, spec: CacheSpec) -> DecodeState | None:
        """An empty state for decoding; None: this layer remembers nothing of its own."""
        del spec
        return None


@dataclass(frozen=True)
class MixerSpec:
    """What a mixer is built from.

    Attributes:
        model: The model section.
        section: The mixer's own section; None: it has none.
        layer: Index of the block, from 0.
        output_std: Standard deviation of initial weights that write to the residual stream.
    """

    model: ModelConfig
    section: Any
    layer: int
    output_std: float


@dataclass(frozen=True)
class MixerKind:
    """A kind of mixer, described by itself: model, planner, FLOP counter, resume and configuration ask it.

    Attributes:
        build: Makes the mixer of a layer.
        state_bytes: Bytes of a sequence's decode state in a layer, by its spec, the tokens so far and the bytes of an
            element of the model.
        flops: Operations of a token's forward pass in a layer beside its matrices of parameters, by its spec and the
            sequence length.
        cost: What a layer takes beside that, by its spec, for the planner.
        section: Settings of its own, written under model.NAME; None: it has none.
        check: Refuses settings that cannot work: raises UsageError naming fields and values.
        shapes: Settings that give a checkpoint's weights their meaning, by field name: it cannot be resumed with
            others.
    """

    build: Callable[[MixerSpec], Mixer]
    state_bytes: Callable[[MixerSpec, int, int], int]
    flops: Callable[[MixerSpec, int], float]
    cost: Callable[[MixerSpec], MixerCost]
    section: type[Section] | None = None
    check: Callable[[ModelConfig, Any], None] = lambda model, section: None
    shapes: Callable[[ModelConfig, Any], dict[str, Any]] = lambda model, section: {}
