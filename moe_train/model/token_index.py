"""Index of the tokens of a stream: position, document, offset in the document and random key of each.

Legend: B batch, S sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenIndex:
    """Index of the tokens of one forward pass. B of a field may be 1 if all rows of the batch have the same values.

    Attributes:
        positions_BS: int64 positions in the sequence.
        offsets_BS: int64 positions counted from the first token of the token's document in this row; without documents,
            the positions. At a token with offset 0, a mixer's state starts anew.
        documents_BS: int64 ids of the packed documents; None: no isolation.
        keys_BS: int64 random key of each token, the same on any layout (a hash of step, sequence and position).
        copies_BS: int64, 0 for the token itself and 1, 2, ... for its hidden copies; None: there are no copies.
        first_position: First position, if the host knows that every row's positions are first_position,
            first_position + 1, ...; None: it does not know.
    """

    positions_BS: Tensor
    offsets_BS: Tensor
    documents_BS: Tensor | None
    keys_BS: Tensor
    copies_BS: Tensor | None = None
    first_position: int | None = None


def document_offsets(documents_BS: Tensor) -> Tensor:
    """Count the positions from the first token of the document in the row. int64 [B, S].

    Args:
        documents_BS: int64 ids; a document is a run of equal ids.
    """
    places_BS = torch.arange(documents_BS.shape[1], device=documents_BS.device).expand_as(documents_BS)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    first_BS = torch.where(begins_BS, places_BS, 0).cummax(1).values
    return places_BS - first_BS
