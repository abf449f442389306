"""The decoder: embedding, blocks, final norm, head.

Legend: B batch, S sequence, D hidden_size, V vocab_size, L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from moe_train.distributed.context import ContextShard
from moe_train.model.block import NO_STATES, Block
from moe_train.model.decode_state import Cache, CacheSpec, LayerStates
from moe_train.model.layers import Embedding, Head
from moe_train.model.mixers.base import MixerContext, Shared
from moe_train.model.moe.layer import MoELayer
from moe_train.model.moe.routers.base import Router
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.token_index import TokenIndex, document_offsets, starts_of_documents
from moe_train.ops.keyed_random import combine, make_key


@dataclass(frozen=True)
class Tokens:
    """A micro-batch of one rank.

    Attributes:
        ids_BS: int64 token ids.
        sequences_B: int64 global index of each sequence: with the position it keys every random draw.
        step: Optimizer step, from 0; it keys random draws too.
        positions_BS: int64 positions, B may be 1; None: first_position, first_position + 1, ... in every row.
        documents_BS: int64 ids of the packed documents; None: no isolation.
        offsets_BS: int64 positions counted from the first token of the token's document in its row; None: computed
            from the documents, which is possible only for whole rows.
        first_position: First position, if positions_BS is None.
        hidden_from: First column whose hidden copies are computed, in a model with hidden copies that decodes: only the
            tokens from there on get logits. None: all.
        document_starts: Places in the flattened batch at which documents begin, then B*S, for whole rows; None: read
            off the documents, where the host has to wait for the device.
        shard: This rank's part of the rows, if ranks share them: then positions and offsets are given. None: the rows
            are whole.
    """

    ids_BS: Tensor
    sequences_B: Tensor
    step: int = 0
    positions_BS: Tensor | None = None
    documents_BS: Tensor | None = None
    offsets_BS: Tensor | None = None
    first_position: int = 0
    hidden_from: int | None = None
    document_starts: tuple[int, ...] | None = None
    shard: ContextShard | None = None


@dataclass(frozen=True)
class ModelOutput:
    """Output of a forward pass.

    Attributes:
        logits_BSV: Logits in the model's dtype; S is the number of logits asked for.
        sums: Routing sums [L, ...] of this rank's micro-batch; None without MoE layers.
    """

    logits_BSV: Tensor
    sums: RoutingSums | None


@dataclass(frozen=True)
class LossOutput:
    """Output of a forward pass with targets.

    Attributes:
        total: Sum of the losses of all tokens, scalar in nats, fp32 or wider.
        losses_BS: Loss of each token, without a gradient; 0 for ignored targets.
        sums: Routing sums [L, ...] of this rank's micro-batch; None without MoE layers.
    """

    total: Tensor
    losses_BS: Tensor
    sums: RoutingSums | None


class StreamHook(Protocol):
    """A hook that expands the token stream below the blocks and contracts it above them."""

    def expand(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, MixerContext]:
        """Return the stream that the blocks see, and a context with its positions, documents and keys."""

    def contract(self, x_BSD: Tensor, context: MixerContext) -> Tensor:
        """Return the stream that the head sees."""

    def hidden_from(self, tokens: Tokens, num_logits: int) -> int | None:
        """Return the first column that must be expanded for the last logits and all that follow; None: all must."""


class Transformer(nn.Module):
    """A decoder-only language model with MoE layers."""

    def __init__(
        self,
        embedding: Embedding,
        blocks: Sequence[Block],
        final_norm: nn.Module | None,
        head: Head,
        seed: int,
        stream_hook: StreamHook | None = None,
        loss_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.head = head
        self.token_key = make_key(seed, "tokens")
        self.stream_hook = stream_hook
        self.loss_chunk = loss_chunk

    def forward(
        self,
        tokens: Tokens,
        cache: Cache | None = None,
        num_logits: int | None = None,
        targets_BS: Tensor | None = None,
    ) -> ModelOutput | LossOutput:
        """Compute the logits of every next token, or with targets the losses.

        Args:
            tokens: Micro-batch; with a cache, only its new tokens, with positions.
            cache: Cache for decoding, from `new_cache`, which takes in the tokens; None: no decoding.
            num_logits: Number of last tokens of each sequence that get logits; None: all, from `hidden_from` on.
            targets_BS: int64 next tokens; IGNORED_TARGET is left out. None: logits are wanted. With targets, not all
                logits need to exist at a time.

        Collective: All ranks of the expert-parallel group, and of the data-parallel group under ZeRO-3; all ranks that
            share the rows.
        """
        context = MixerContext(0, self._token_index(tokens, is_whole=cache is None), shard=tokens.shard)
        x_BSD = self.embedding(tokens.ids_BS)
        if self.stream_hook is not None:
            x_BSD, context = self.stream_hook.expand(x_BSD, context)
        shared: Shared = {}
        sums = []
        for layer, block in enumerate(self._typed_blocks):
            states = cache.layer(layer) if cache is not None else NO_STATES
            output = block(x_BSD, replace(context, layer=layer, shared=shared), states)
            x_BSD, shared = output.x_BSD, output.shared
            if output.sums is not None:
                sums.append(output.sums)
        if self.stream_hook is not None:
            x_BSD = self.stream_hook.contract(x_BSD, context)
        if num_logits is not None:
            x_BSD = x_BSD[:, -num_logits:]
        if self.final_norm is not None:
            x_BSD = self.final_norm(x_BSD)
        stacked = RoutingSums.stack(sums) if sums else None
        if targets_BS is None:
            return ModelOutput(self.head(x_BSD), stacked)
        total, losses_BS = self.head(x_BSD, targets_BS, self.loss_chunk)
        return LossOutput(total, losses_BS, stacked)

    def for_prefill(self, tokens: Tokens, num_logits: int = 1) -> Tokens:
        """Leave out the hidden copies of a prompt that no logits depend on, neither the last ones nor those to follow.

        Args:
            tokens: Whole prompts, before they are cut into chunks.
            num_logits: Number of last tokens of each prompt whose logits are wanted.
        """
        if self.stream_hook is None or tokens.ids_BS.shape[1] == num_logits:
            return tokens
        return replace(tokens, hidden_from=self.stream_hook.hidden_from(tokens, num_logits))

    def new_cache(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> Cache:
        """Make an empty cache for decoding, with all its memory.

        Args:
            batch_size: Number of sequences that are decoded together.
            max_length: Most tokens of one sequence, padding included.
            dtype: dtype of keys and values; None: that of the model.
        """
        weight = self.embedding.weight
        spec = CacheSpec(batch_size, max_length, dtype or weight.dtype, weight.device)
        return Cache(
            [
                LayerStates(block.mixer.new_state(spec), block.feed_forward.new_state(spec))
                for block in self._typed_blocks
            ]
        )

    def warm_up(self, share: float) -> None:
        """Tell the mixers, before a training step, the share of the optimizer's warm-up steps that are over."""
        for block in self._typed_blocks:
            block.mixer.warm_up(share)

    @property
    def routers(self) -> list[Router]:
        """Routers of the MoE layers, in the order of the layers."""
        layers = [block.feed_forward for block in self._typed_blocks]
        return [layer.router for layer in layers if isinstance(layer, MoELayer)]

    @property
    def _typed_blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))  # ModuleList does not tell what it holds

    def _token_index(self, tokens: Tokens, is_whole: bool = True) -> TokenIndex:
        positions_BS, first_position = tokens.positions_BS, None
        if positions_BS is None:
            first_position, length = tokens.first_position, tokens.ids_BS.shape[1]
            positions_BS = torch.arange(first_position, first_position + length, device=tokens.ids_BS.device)
            positions_BS = positions_BS.unsqueeze(0)
        offsets_BS = tokens.offsets_BS
        if offsets_BS is None:
            offsets_BS = positions_BS if tokens.documents_BS is None else document_offsets(tokens.documents_BS)
        documents_BS, starts = tokens.documents_BS, None
        if is_whole and documents_BS is not None and first_position is not None:
            documents_BS = documents_BS.expand(len(tokens.ids_BS), -1)
            starts = tokens.document_starts or starts_of_documents(documents_BS)
        sequence_keys_B = combine(combine(tokens.sequences_B, self.token_key), tokens.step)
        keys_BS = combine(sequence_keys_B.unsqueeze(1), positions_BS)
        return TokenIndex(
            positions_BS,
            offsets_BS,
            documents_BS,
            keys_BS,
            hidden_from=tokens.hidden_from,
            first_position=first_position,
            is_whole=is_whole,
            document_starts=starts,
        )
