"""Index of the tokens of a stream: position, document, offset in the document and random key of each.

Legend: B batch, S sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CopiesLayout:
    """Layout of a stream with hidden copies: the originals, then copy 2 of the last positions, ..., then copy n.

    Attributes:
        number: n, copies of a token, the original included; at least 2.
        window: W, positions before its own whose hidden copies a hidden copy sees.
        chunk: C, positions of a chunk, beyond whose start the window does not reach; None: there are no chunks.
        num_originals: t, number of originals.
        num_positions: s, number of the last positions that have hidden copies in the stream.
    """

    number: int
    window: int
    chunk: int | None
    num_originals: int
    num_positions: int


@dataclass(frozen=True)
class TokenIndex:
    """Index of the tokens of one forward pass. B of a field may be 1 if all rows of the batch have the same values.

    Attributes:
        positions_BS: int64 positions in the sequence.
        offsets_BS: int64 positions counted from the first token of the token's document in this row; without documents,
            the positions. At a token with offset 0, a mixer's state starts anew.
        documents_BS: int64 ids of the packed documents; None: no isolation.
        keys_BS: int64 random key of each token, the same on any layout (a hash of step, sequence and position).
        copies: Layout of the tokens' hidden copies, which the fields above contain; None: there are none.
        hidden_from: First column whose hidden copies are wanted, if the stream gets hidden copies; None: all.
        first_position: First position, if the host knows that every row's positions are first_position,
            first_position + 1, ...; None: it does not know.
        is_whole: Whether these are all tokens of the sequences: nothing is decoded.
        document_starts: Places in the flattened batch at which documents begin, then B*S, known on the host, where rows
            are whole and the positions follow one another; None: no isolation, or it does not know.
    """

    positions_BS: Tensor
    offsets_BS: Tensor
    documents_BS: Tensor | None
    keys_BS: Tensor
    copies: CopiesLayout | None = None
    hidden_from: int | None = None
    first_position: int | None = None
    is_whole: bool = False
    document_starts: tuple[int, ...] | None = None

    def columns(self, span: slice) -> "TokenIndex":
        """Select tokens of the stream, which count as tokens without copies."""

        def part(x_BS: Tensor) -> Tensor:
            return x_BS[:, span]

        documents_BS = None if self.documents_BS is None else part(self.documents_BS)
        return TokenIndex(part(self.positions_BS), part(self.offsets_BS), documents_BS, part(self.keys_BS))


def starts_of_documents(documents_BS: Tensor) -> tuple[int, ...]:
    """Find the places in the flattened batch at which documents begin; last comes B*S. Host synchronisation.

    Args:
        documents_BS: int64 ids; a document is a run of equal ids in a row.
    """
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return (*begins_BS.flatten().nonzero().squeeze(1).tolist(), documents_BS.numel())


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
