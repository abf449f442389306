"""Compressive memory: an associative matrix that linear attention writes to and reads from, segment by segment.

Source: Munkhdalai et al. 2024, arXiv 2404.07143.
Legend: B batch, n segments, G key/value heads, S tokens, d size of keys, v size of values; * leading dimensions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """A memory with its normaliser.

    Attributes:
        matrix: Sum of sigma(k)^T v, [*, d, v].
        total: Sum of sigma(k), [*, d].
    """

    matrix: Tensor
    total: Tensor

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.matrix + other.matrix, self.total + other.total)

    def where(self, chosen: Tensor, other: "Memory | None" = None) -> "Memory":
        """Keep this memory where `chosen` [*], and take the other, or an empty one, elsewhere."""
        matrix, total = (0.0, 0.0) if other is None else (other.matrix, other.total)
        chosen_ = chosen.view(*chosen.shape, *(1,) * (self.total.dim() - chosen.dim()))
        return Memory(torch.where(chosen_.unsqueeze(-1), self.matrix, matrix), torch.where(chosen_, self.total, total))


def write(k_GSd: Tensor, v_GSv: Tensor, filled_S: Tensor) -> Memory:
    """Make the memory of some tokens alone.

    Args:
        k_GSd: Keys [*, G, S, d] before the rotary embedding.
        v_GSv: Values [*, G, S, v].
        filled_S: bool [*, S], whether there is a token.
    """
    features_GSd = (F.elu(k_GSd) + 1) * filled_S[..., None, :, None]
    return Memory(features_GSd.transpose(-1, -2) @ v_GSv, features_GSd.sum(-2))


def read(q_GSd: Tensor, memory: Memory, is_empty: Tensor) -> Tensor:
    """Read the values that the memory has for some queries; zeros where the memory is empty. [*, G, S, v].

    The result does not change if all features of a query have a common factor, so they are taken relative to the
    largest: in fp32, ELU(-110) + 1 is 0.

    Args:
        q_GSd: Queries [*, G, S, d] before the rotary embedding.
        memory: Memory [*, G, ...].
        is_empty: bool [*], whether nothing was written to the memory. A mask, not a test of `total`, so that no
            gradient divides zero by zero.
    """
    logs_GSd = torch.where(q_GSd > 0, torch.log1p(q_GSd.clamp(min=0)), q_GSd)
    features_GSd = (logs_GSd - logs_GSd.amax(-1, keepdim=True)).exp()
    weights_GS1 = features_GSd @ memory.total.unsqueeze(-1)
    found_GSv = (features_GSd @ memory.matrix) / weights_GS1.clamp(min=torch.finfo(q_GSd.dtype).tiny)
    return torch.where(is_empty[..., None, None, None], 0.0, found_GSv)


def entering_memories(segments: Memory, before: Memory, begins_Bn: Tensor) -> Memory:
    """Add up, for each segment, the memories of the segments of its document before it. [B, n, G, ...].

    Args:
        segments: What each segment writes, [B, n, G, ...].
        before: Memory of the segments before the first one, [B, G, ...].
        begins_Bn: bool, whether the segment begins a document.
    """
    document_Bn = begins_Bn.cumsum(1)
    # A product with zeros, not a difference of running sums: nothing of one document rounds off in another.
    earlier_Bnn = (document_Bn.unsqueeze(2) == document_Bn.unsqueeze(1)).tril(-1)
    weights_Bnn = earlier_Bnn.expand(segments.total.shape[0], -1, -1).to(segments.total.dtype)
    matrix, total = (
        (weights_Bnn @ part.flatten(2)).view_as(part) for part in (segments.matrix, segments.total)
    )  # (B, n, n) x (B, n, G*d*v)
    carried = Memory(before.matrix.unsqueeze(1), before.total.unsqueeze(1)).where(document_Bn == 0)
    return Memory(matrix, total) + carried
