"""Interface of sequence mixers, which mix tokens along the sequence.

Legend: B batch, S sequence, D hidden_size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe_train.config.base import Section
from moe_train.config.errors import UsageError
from moe_train.config.model import MIXER_FIELDS, ModelConfig
from moe_train.distributed.context import ContextRanks, ContextShard
from moe_train.model.cost import MixerCost
from moe_train.model.decode_state import CacheSpec, DecodeState
from moe_train.model.token_index import TokenIndex
from moe_train.ops.aligned_blocks import AlignedBlocks, align
from moe_train.ops.attention_blocks import AttentionBlocks, rows_of_documents, rows_of_positions
from moe_train.ops.hidden_attention import HiddenBlocks, hidden_blocks
from moe_train.ops.rotary import rotary_angles

Formed = TypeVar("Formed")

Shared = dict[str, Tensor]
"""Tensors that layers hand up to those above, by name: MLKV's keys and values, RWKV-7's first values."""


@dataclass(frozen=True)
class MixerContext:
    """Context of a block's mixer and feed-forward layer.

    Attributes:
        layer: Index of the block, from 0.
        tokens: Index of the tokens.
        shared: Tensors that the layers below have handed up; empty for the first layer.
        state: State of this mixer (or feed-forward layer) while decoding; None: there is none.
        shard: This rank's part of the rows, if ranks share them; None: the rows are whole.
        formed: Values that layers have computed from the positions in this forward pass, for other layers.
    """

    layer: int
    tokens: TokenIndex
    shared: Shared = field(default_factory=dict)
    state: Any = None
    shard: ContextShard | None = None
    formed: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def sharing(self) -> ContextRanks | None:
        """Ranks that share the rows; their observer names this layer. None: the rows are whole."""
        return None if self.shard is None else self.shard.in_layer(self.layer).ranks

    def rotary_angles(self, head_dim: int, theta: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Compute `ops.rotary.rotary_angles` of these positions, once for all layers with the same arguments.

        The dtype is that of a model's activations; the angles are fp32 or wider.
        """
        wide = torch.promote_types(dtype, torch.float32)
        positions_BS = self.tokens.positions_BS
        return self.once(
            ("angles", head_dim, theta, wide), positions_BS, lambda: rotary_angles(positions_BS, head_dim, theta, wide)
        )

    def block_angles(self, size: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute `ops.rotary.rotary_angles` of the offsets modulo the size of a block, once for all layers."""
        offsets_BS = self.tokens.offsets_BS
        return self.once(
            ("block angles", size, head_dim, theta, dtype),
            offsets_BS,
            lambda: rotary_angles(offsets_BS % size, head_dim, theta, dtype),
        )

    def aligned_blocks(self, size: int) -> AlignedBlocks:
        """Place the tokens of whole rows in blocks by their offsets, once for all layers with blocks of this size."""
        tokens, offsets_BS = self.tokens, self.tokens.offsets_BS
        width = min(size, offsets_BS.shape[1])  # a single block needs no more columns than there are tokens

        def make() -> AlignedBlocks:
            if tokens.documents_BS is None and tokens.first_position == 0:
                return AlignedBlocks.of_whole_rows(offsets_BS.shape[1], size, width, offsets_BS.device)
            return align(offsets_BS, size, width=width)

        return self.once(("blocks", size), offsets_BS, make)

    def state_blocks(
        self, size: int, batch_size: int, width: int | None = None, is_compact: bool = False
    ) -> AlignedBlocks:
        """Place new tokens, before which others may have come, in blocks by their offsets, once for all layers.

        Host synchronisation, once for all layers, if the rows have documents or stand at places of their own.

        Args:
            size: Offsets of a block.
            batch_size: B of the result.
            width: As in `ops.aligned_blocks.align`.
            is_compact: As in `ops.aligned_blocks.align`.
        """
        tokens, offsets_BS = self.tokens, self.tokens.offsets_BS

        def make() -> AlignedBlocks:
            num_blocks = None
            if tokens.documents_BS is None and tokens.first_position is not None:
                num_blocks = (tokens.first_position % size + offsets_BS.shape[1] - 1) // size + 1
            rows_BS = offsets_BS.expand(batch_size, -1)
            return align(rows_BS, size, width=width, is_compact=is_compact, num_blocks=num_blocks)

        return self.once(("state blocks", size, batch_size, width, is_compact), offsets_BS, make)

    def hidden_blocks(self) -> HiddenBlocks:
        """Compute `ops.hidden_attention.hidden_blocks` of whole rows with hidden copies, once for all layers."""
        copies, offsets_BS = self.tokens.copies, self.tokens.offsets_BS
        assert copies is not None, "there are hidden copies"
        own_BS = offsets_BS[:, : copies.num_originals]
        return self.once(
            ("hidden blocks", copies),
            offsets_BS,
            lambda: hidden_blocks(own_BS, copies.number, copies.window, copies.chunk),
        )

    def attention_blocks(self, window: int | None, head_dim: int, dtype: torch.dtype) -> AttentionBlocks | None:
        """Cut whole rows into blocks of attention, once for all layers with this window; of the originals, with copies.

        Args:
            window: Most positions that a query sees, its own included; None: all.
            head_dim: d, head size.
            dtype: dtype of queries and keys.

        Returns:
            The blocks; None: every query sees the keys up to its own place.
        """
        tokens, positions_BS = self.tokens, self.tokens.positions_BS
        length = positions_BS.shape[1] if tokens.copies is None else tokens.copies.num_originals
        documents_BS, starts = tokens.documents_BS, tokens.document_starts
        is_ordered = tokens.first_position is not None and (documents_BS is None or starts is not None)
        if window is not None and window >= length and is_ordered:
            window = None
        if is_ordered and documents_BS is None and window is None:
            return None

        def make() -> AttentionBlocks:
            if is_ordered:
                return rows_of_documents(length, starts, window, positions_BS.device, dtype, head_dim)
            own = None if documents_BS is None else documents_BS[:, :length]
            return rows_of_positions(positions_BS[:, :length], own, window)

        source = positions_BS if documents_BS is None else documents_BS
        return self.once(("attention blocks", window, head_dim, dtype), source, make)

    def once(self, key: Any, source: Tensor, compute: Callable[[], Formed]) -> Formed:
        """Compute a value for all layers, or return the one that a layer below has computed.

        Args:
            key: Name of the value, with all arguments that it depends on beside the tokens.
            source: The tokens' positions, offsets or documents, from which it is computed.
            compute: Function that computes it.
        """
        known = self.formed.get(key)
        if known is None or known[0] is not source:  # a hook may have put others in their place
            known = self.formed[key] = (source, compute())
        return known[1]


class Mixer(nn.Module, ABC):
    """A sequence mixer. It is causal, and streams: any split of a sequence gives the same outputs."""

    @abstractmethod
    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        """Mix S new tokens, starting from the state if there is one.

        Args:
            x_BSD: Normalised hidden states.
            context: Context of the mixer.

        Returns:
            The mixed sequence [B, S, D], and what the layers above see: context.shared with this layer's own tensors.
            They go up as explicit tensors, so that activation recomputation and ZeRO's hooks see them.
        """

    def new_state(self, spec: CacheSpec) -> DecodeState | None:
        """Make an empty state for decoding; None: this layer remembers nothing of its own."""
        del spec
        return None

    def warm_up(self, share: float) -> None:
        """Take in, before a training step, the share of the optimizer's warm-up steps that are over, from 0 to 1."""
        del share


@dataclass(frozen=True)
class MixerSpec:
    """Settings that a mixer is built from.

    Attributes:
        model: Model section of the configuration.
        section: Own section of the mixer; None: it has none.
        layer: Index of the block, from 0.
        output_std: Standard deviation of initial weights that write to the residual stream.
    """

    model: ModelConfig
    section: Any
    layer: int
    output_std: float


@dataclass(frozen=True)
class MixerKind:
    """Description of a kind of mixer, for model, planner, FLOP counter, resume and configuration.

    Attributes:
        build: Function that makes the mixer of a layer.
        state_bytes: Function that gives the bytes of a sequence's decode state in a layer, from the layer's spec, the
            tokens so far and the bytes per element of the model.
        flops: Function that gives the operations of a token's forward pass in a layer, without its matrices of
            parameters, from the layer's spec and the sequence length.
        cost: Function that gives the other costs of a layer, from its spec, for the planner.
        section: Class of its own settings, written under model.NAME; None: it has none.
        check: Function that refuses settings that cannot work: it raises UsageError naming fields and values.
        shapes: Function that gives the settings on which the meaning of a checkpoint's weights depends, by field name;
            a run with other values cannot resume from the checkpoint.
        check_length: Function that refuses training sequences of a length, in tokens, that the settings cannot work
            with, as `check` does.
        takes_hidden_copies: Whether the mixer works on a stream with hidden copies (`TokenIndex.copies`).
        reads: Fields of the model section among MIXER_FIELDS that the mixer reads. One that no mixer of a pattern reads
            is refused, unless it has its default.
        part_obstacle: Function that gives the reason why the mixer does not work on a rank's part of a sequence
            (`MixerContext.shard`), from the model's and its own section and the tokens of a chunk, of which a rank has
            two; None: it does.
    """

    build: Callable[[MixerSpec], Mixer]
    state_bytes: Callable[[MixerSpec, int, int], int]
    flops: Callable[[MixerSpec, int], float]
    cost: Callable[[MixerSpec], MixerCost]
    section: type[Section] | None = None
    check: Callable[[ModelConfig, Any], None] = lambda model, section: None
    shapes: Callable[[ModelConfig, Any], dict[str, Any]] = lambda model, section: {}
    check_length: Callable[[Any, int], None] = lambda section, length: None
    takes_hidden_copies: bool = False
    reads: frozenset[str] = MIXER_FIELDS
    part_obstacle: Callable[[ModelConfig, Any, int], str | None] = lambda model, section, chunk: (
        "it needs all tokens of a sequence"
    )


def works_on_parts(model: ModelConfig, section: Any, chunk: int) -> None:
    """Say of a mixer that it works on a rank's part of a sequence, whatever its settings are."""
    del model, section, chunk


def check_heads(model: ModelConfig, name: str) -> None:
    """Refuse heads that do not divide the hidden size evenly, for mixers whose heads are parts of it."""
    if model.head_dim is not None and model.head_dim * model.num_heads != model.hidden_size:
        raise UsageError(
            f"model.head_dim ({model.head_dim}) x model.num_heads ({model.num_heads}) must be model.hidden_size "
            f"({model.hidden_size}) for mixer {name}: leave head_dim out"
        )
