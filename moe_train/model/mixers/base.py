"""The interface of everything that mixes tokens along the sequence.

Legend: B batch, S sequence, D hidden_size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor, nn

from moe_train.model.decode_state import CacheSpec, DecodeState, KeyValue
from moe_train.ops.rotary import rotary_angles


@dataclass(frozen=True)
class MixerContext:
    """What a block's mixer and MoE layer may know of their surroundings.

    Attributes:
        layer: Index of the block, from 0.
        positions_BS: int64 positions in the sequence; B may be 1 where all rows have the same.
        documents_BS: int64 ids of the packed documents, or None: no isolation.
        token_keys_BS: int64 random key of every token, the same on any layout (step, sequence and position hashed).
        key_value: Keys and values of the nearest owner layer at or below this one, or None below the first.
        state: This layer's state when decoding, else None.
        formed: What layers have formed of the positions so far in this forward pass, by head size and theta.
    """

    layer: int
    positions_BS: Tensor
    documents_BS: Tensor | None
    token_keys_BS: Tensor
    key_value: KeyValue | None = None
    state: DecodeState | None = None
    formed: dict[tuple[int, float], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, compare=False)

    def rotary_angles(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """As `ops.rotary.rotary_angles` of these positions: formed once for all layers that turn alike."""
        known = self.formed.get((head_dim, theta))
        if known is None or known[0] is not self.positions_BS:  # a hook may have put others in their place
            known = (self.positions_BS, *rotary_angles(self.positions_BS, head_dim, theta))
            self.formed[head_dim, theta] = known
        return known[1], known[2]

    def with_key_value(self, key_value: KeyValue | None) -> Self:
        """A copy that carries newly published keys and values."""
        return replace(self, key_value=key_value)


class Mixer(nn.Module, ABC):
    """Mixes along the sequence: causal, and in decoding equal to the full forward for any split of the sequence."""

    def publish(self, x_BSD: Tensor, context: MixerContext) -> KeyValue | None:
        """Keys and values for this layer and those above, or None: those of an owner below are handed on.

        The block hands them on as explicit tensors, so that activation recomputation and ZeRO's hooks see them.
        """
        del x_BSD
        return context.key_value

    def new_state(self, room: CacheSpec) -> DecodeState | None:
        """An empty state for decoding, or None where this layer keeps nothing of its own."""
        del room
        return None

    @abstractmethod
    def forward(self, x_BSD: Tensor, context: MixerContext) -> Tensor:
        """The mixed sequence, [B, S, D]; `context.key_value` holds what `publish` returned."""
