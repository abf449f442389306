"""Transcript of a batch of texts that grow unequally: the ids of each row with position, document and offset.

Legend: B texts, S tokens, N columns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.model.transformer import Tokens


class Transcript:
    """Texts with room for more tokens. Columns that are written again replace what was there."""

    def __init__(self, prompts: Tokens, prompt_lengths_B: Tensor, room: int, end_of_document: int | None) -> None:
        """Begin with padded prompts.

        Args:
            prompts: Prompts, padded on the left to one length.
            prompt_lengths_B: int64 tokens of each prompt without padding.
            room: Number of columns behind the prompts.
            end_of_document: Id of the token that begins a document; None: documents are not isolated.
        """
        self._ids_BN = F.pad(prompts.ids_BS, (0, room))
        self._sequences_B, self._step, self._end_of_document = prompts.sequences_B, prompts.step, end_of_document
        self._padding_B1 = prompts.ids_BS.shape[1] - prompt_lengths_B.unsqueeze(1)
        self._documents_BN: Tensor | None = None
        if prompts.documents_BS is not None and prompts.offsets_BS is not None:
            self._documents_BN, self._offsets_BN = (
                F.pad(x_BS, (0, room)) for x_BS in (prompts.documents_BS, prompts.offsets_BS)
            )

    def positions(self, columns_BS: Tensor) -> Tensor:
        """Return the positions of columns in their texts; 0 for padding. int64 [B, S]."""
        return (columns_BS - self._padding_B1).clamp(min=0)

    def write(self, ids_BS: Tensor, columns_BS: Tensor) -> None:
        """Write tokens to columns, which follow one another in each row; the column before them has a token."""
        self._ids_BN.scatter_(1, columns_BS, ids_BS)
        if self._documents_BN is None:
            return
        before_B1 = columns_BS[:, :1] - 1
        places_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        # The end-of-document token belongs to the document after it.
        is_mark_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        if self._end_of_document is not None:
            is_mark_BS = ids_BS == self._end_of_document
        documents_BS = self._documents_BN.gather(1, before_B1) + is_mark_BS.cumsum(1)
        newest_BS = torch.where(is_mark_BS, places_S, -1).cummax(1).values
        since_BS = self._offsets_BN.gather(1, before_B1) + 1 + places_S
        self._documents_BN.scatter_(1, columns_BS, documents_BS)
        self._offsets_BN.scatter_(1, columns_BS, torch.where(newest_BS >= 0, places_S - newest_BS, since_BS))

    def tokens(self, columns_BS: Tensor, first: Sequence[int]) -> Tokens:
        """Return the tokens of columns, as input of a model.

        Args:
            columns_BS: int64 columns, which follow one another in each row.
            first: The first column of each row, known on the host.
        """
        ids_BS = self._ids_BN.gather(1, columns_BS)
        if self._documents_BN is not None:
            documents_BS, offsets_BS = (x_BN.gather(1, columns_BS) for x_BN in (self._documents_BN, self._offsets_BN))
            positions_BS = self.positions(columns_BS)
            return Tokens(ids_BS, self._sequences_B, self._step, positions_BS, documents_BS, offsets_BS)
        if len(set(first)) == 1:  # without documents there is no padding; single tokens need no mask
            return Tokens(ids_BS, self._sequences_B, self._step, first_position=first[0])
        return Tokens(ids_BS, self._sequences_B, self._step, self.positions(columns_BS))
