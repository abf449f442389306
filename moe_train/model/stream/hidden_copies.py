"""Parallel hidden decoding: every token passes the blocks in n copies side by side, and the last copy predicts.

Copy 1 is the original: the originals' stream is that of the model without copies, and so is its cache. Copies 2, ..., n
are hidden: only hidden copies of the token itself, and of tokens in a window, see their keys. There is no new
parameter: all copies have the same embedding, position and weights, and differ in what they see.

Source: Wu et al. 2025, arXiv 2504.14992. It leaves open: all copies of a token have its position; the window counts
positions before the own one; copy j >= 2 has a random key of its own.
Legend: B batch, S sequence, D hidden_size, n copies, t originals, s positions with hidden copies.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.model.mixers.base import MixerContext
from moe_train.model.token_index import CopiesLayout, document_offsets
from moe_train.model.transformer import Tokens
from moe_train.ops.keyed_random import combine


class HiddenCopies:
    """Stream hook that adds the hidden copies below the blocks, and keeps the last copy above them."""

    def __init__(self, copies: int, window: int, chunk: int | None, num_layers: int) -> None:
        """Take the settings.

        Args:
            copies: n, copies of a token, the original included; at least 2.
            window: W, positions before its own whose hidden copies a hidden copy sees.
            chunk: C, positions of a chunk, beyond whose start the window does not reach; None: there are no chunks.
            num_layers: L, blocks of the model.
        """
        self.copies, self.window, self.chunk, self.num_layers = copies, window, chunk, num_layers

    @staticmethod
    def of(config: ModelConfig) -> "HiddenCopies":
        """Make the hook of a model from its configuration."""
        own = config.hidden_copies
        return HiddenCopies(own.copies, own.window_positions, own.chunk, config.num_layers)

    def expand(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, MixerContext]:
        """Append to the stream copy 2 of the last s positions, then copy 3, ..., then copy n."""
        tokens, length = context.tokens, x_BSD.shape[1]
        first, hidden = min(tokens.hidden_from or 0, length), self.copies - 1

        def repeated(x: Tensor) -> Tensor:
            return torch.cat((x, *[x[:, first:]] * hidden), dim=1)

        hidden_keys = [combine(tokens.keys_BS[:, first:], copy) for copy in range(2, self.copies + 1)]
        expanded = replace(
            tokens,
            positions_BS=repeated(tokens.positions_BS),
            offsets_BS=repeated(tokens.offsets_BS),
            documents_BS=None if tokens.documents_BS is None else repeated(tokens.documents_BS),
            keys_BS=torch.cat((tokens.keys_BS, *hidden_keys), dim=1),
            copies=CopiesLayout(self.copies, self.window, self.chunk, length, length - first),
        )
        return repeated(x_BSD), replace(context, tokens=expanded)

    def contract(self, x_BSD: Tensor, context: MixerContext) -> Tensor:
        """Keep the last copy. [B, s, D]."""
        copies = context.tokens.copies
        assert copies is not None, "the stream was expanded"
        return x_BSD[:, x_BSD.shape[1] - copies.num_positions :]

    def hidden_from(self, tokens: Tokens, num_logits: int) -> int:
        """Find the first column of prompts whose hidden copies the wanted logits, and all that follow, depend on.

        A block looks W positions back among hidden copies, so the wanted logits look back L W positions in all, and not
        beyond the start of their document or chunk. Host synchronisation, if there are documents.

        Args:
            tokens: Whole prompts.
            num_logits: Number of last tokens of each prompt whose logits are wanted.
        """
        first = tokens.ids_BS.shape[1] - num_logits
        if tokens.offsets_BS is not None:
            offset_B = tokens.offsets_BS[:, first]
        elif tokens.documents_BS is not None:
            offset_B = document_offsets(tokens.documents_BS)[:, first]
        elif tokens.positions_BS is not None:
            offset_B = tokens.positions_BS[:, first]
        else:
            offset_B = torch.tensor([tokens.first_position + first])
        in_reach_B = offset_B if self.chunk is None else offset_B % self.chunk
        return max(0, first - min(int(in_reach_B.max()), self.num_layers * self.window))
