"""Aligned blocks: the grid of a mixer that counts by the offset of a token in its document.

Block number i of a document holds the offsets i * size to (i + 1) * size - 1, wherever the document lies in its row.
So a packed document has the blocks that it has alone, and rows that go on at other offsets fill their open blocks
further.

Legend: B batch, S sequence, n blocks, w columns of a block; * any further dimensions.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AlignedBlocks:
    """Places of the tokens of a forward pass in blocks. B of a field may be 1 if all rows have the same offsets.

    Attributes:
        num_blocks: n, the most blocks of a row.
        width: w, columns of a block.
        places_BS: int64 block * w + column of each token; n * w for a token that is in no block. None: token t of every
            row has place t.
        begins_Bn: bool, whether the block has the first token of a document.
        is_full_Bn: bool, whether the block's last offset has come.
        last_B: int64, number of the last block that has a token; 0 for a row without any.
    """

    num_blocks: int
    width: int
    places_BS: Tensor | None
    begins_Bn: Tensor
    is_full_Bn: Tensor
    last_B: Tensor

    def split(self, x: Tensor) -> Tensor:
        """Lay out tokens in blocks; empty columns are zero. (B, S, *) -> (B, n, w, *)."""
        room = self.num_blocks * self.width
        if self.places_BS is None:
            padding = (0, 0) * (x.dim() - 2) + (0, room - x.shape[1])
            flat = F.pad(x, padding) if room > x.shape[1] else x
        else:
            # One column more for the tokens that are in no block; it is cut off.
            flat = x.new_zeros(x.shape[0], room + 1, *x.shape[2:]).scatter(1, self._index(x, self.places_BS), x)[:, :-1]
        return flat.unflatten(1, (self.num_blocks, self.width))

    def join(self, x: Tensor, length: int) -> Tensor:
        """Return the tokens to their order in the row. (B, n, w, *) -> (B, S, *).

        Args:
            x: Blocks.
            length: S, number of tokens of the row.
        """
        flat = x.flatten(1, 2)
        if self.places_BS is None:
            return flat[:, :length]
        places_BS = self.places_BS.clamp(max=flat.shape[1] - 1)
        like = flat[:, :1].expand(-1, length, *flat.shape[2:])
        return flat.gather(1, self._index(like, places_BS))

    def last(self, x: Tensor) -> Tensor:
        """Select each row's last block that has a token. (B, n, *) -> (B, *)."""
        index_B = self.last_B.expand(x.shape[0])
        return x[torch.arange(x.shape[0], device=x.device), index_B]

    @staticmethod
    def _index(like: Tensor, places_BS: Tensor) -> Tensor:
        return places_BS.view(*places_BS.shape, *(1,) * (like.dim() - 2)).expand_as(like)

    @classmethod
    def of_whole_rows(cls, length: int, size: int, width: int, device: torch.device) -> Self:
        """Make the blocks of rows that begin at offset 0 and have one document each: their tokens stay where they are.

        Args:
            length: S, number of tokens of a row.
            size: Offsets of a block.
            width: w, columns of a block; less than size only if a single block is enough.
            device: Device of the result.
        """
        num_blocks = -(-length // width)
        assert width == size or num_blocks == 1
        numbers_1n = torch.arange(num_blocks, device=device).unsqueeze(0)
        last_B = numbers_1n[:, -1]
        return cls(num_blocks, width, None, numbers_1n == 0, (numbers_1n + 1) * size <= length, last_B)


def align(
    offsets_BS: Tensor,
    size: int,
    valid_BS: Tensor | None = None,
    width: int | None = None,
    is_compact: bool = False,
    num_blocks: int | None = None,
) -> AlignedBlocks:
    """Place tokens in blocks by their offsets. Host synchronisation if S > 1 and the number of blocks is not given.

    Args:
        offsets_BS: int64 positions counted from the first token of the token's document in its row.
        size: Offsets of a block.
        valid_BS: bool; a token that is not valid is in no block; in each row they come last. None: all are valid.
        width: w, columns of a block, where no offset modulo size is larger; None: size.
        is_compact: Whether a block's tokens begin at column 0, also if offsets before them have come earlier; then a
            block has no more than S columns. Else a token's column is its offset modulo size.
        num_blocks: n, where the host knows it, or more; None: it is found from the offsets.
    """
    length = offsets_BS.shape[1]
    slots_BS = offsets_BS % size
    begins_block_BS = slots_BS == 0
    block_BS = begins_block_BS.cumsum(1) - begins_block_BS[:, :1].long()
    if num_blocks is None:
        num_blocks = 1 if length == 1 else int(block_BS.max()) + 1
    width, column_BS = width or size, slots_BS
    if is_compact:
        width, column_BS = min(width, length), slots_BS - torch.where(block_BS == 0, slots_BS[:, :1], 0)
    places_BS = block_BS * width + column_BS
    if valid_BS is not None:
        places_BS = torch.where(valid_BS, places_BS, num_blocks * width)
        block_BS = torch.where(valid_BS, block_BS, 0)
    nowhere = offsets_BS.new_zeros(())
    blocks = AlignedBlocks(num_blocks, width, places_BS, nowhere, nowhere, block_BS.amax(1))
    marks = torch.stack((offsets_BS == 0, slots_BS == size - 1), dim=-1).expand(*places_BS.shape, 2)
    begins_Bn, is_full_Bn = blocks.split(marks).any(2).unbind(-1)
    return AlignedBlocks(num_blocks, width, places_BS, begins_Bn, is_full_Bn, blocks.last_B)
