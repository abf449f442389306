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


@dataclass(frozen=True)
class SegmentWrites:
    """What the segments of each row write, one after the other.

    Attributes:
        k_BnGSd: Keys before the rotary embedding.
        v_BnGSd: Values.
        filled_BnS: bool, whether there is a token.
        begins_Bn: bool, whether the segment has the first token of a document: it finds an empty memory.
        is_full_Bn: bool, whether the segment's last token has come: it is committed.
        is_first_Bn: bool, whether the segment is its document's first, begun here or earlier.
        last_B: int64, number of the last segment of each row that has a token.
    """

    k_BnGSd: Tensor
    v_BnGSd: Tensor
    filled_BnS: Tensor
    begins_Bn: Tensor
    is_full_Bn: Tensor
    is_first_Bn: Tensor
    last_B: Tensor

    def last(self, x_Bn: Tensor) -> Tensor:
        """Select each row's last segment that has a token. (B, n, *) -> (B, *)."""
        return x_Bn[torch.arange(len(x_Bn), device=x_Bn.device), self.last_B]


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


def write_by_linear_rule(segments: SegmentWrites, committed: Memory, pending: Memory) -> tuple[Memory, Memory, Memory]:
    """Add the values of every segment to the memory. No loop over segments.

    Args:
        segments: What the segments write.
        committed: Memory of the full segments before the first one, [B, G, ...].
        pending: What the first segment has written already, if it is open before its first token here.

    Returns:
        The memories that enter the segments [B, n, G, ...], and those committed and pending behind the last one.
    """
    begins_Bn = segments.begins_Bn
    written = write(segments.k_BnGSd, segments.v_BnGSd, segments.filled_BnS)
    open_ = pending.where(~begins_Bn[:, 0])
    first = Memory(written.matrix[:, 0] + open_.matrix, written.total[:, 0] + open_.total)
    written = Memory(
        torch.cat((first.matrix.unsqueeze(1), written.matrix[:, 1:]), dim=1),
        torch.cat((first.total.unsqueeze(1), written.total[:, 1:]), dim=1),
    )
    entering = entering_memories(written, committed, begins_Bn)
    before, last = (Memory(segments.last(each.matrix), segments.last(each.total)) for each in (entering, written))
    is_full_B = segments.last(segments.is_full_Bn)
    return entering, before + last.where(is_full_B), last.where(~is_full_B)


def write_by_delta_rule(segments: SegmentWrites, committed: Memory, pending: Memory) -> tuple[Memory, Memory, Memory]:
    """Do the same segment by segment: a value is written less what the memory returns for its key.

    Args:
        segments: As in `write_by_linear_rule`.
        committed: As in `write_by_linear_rule`.
        pending: As in `write_by_linear_rule`.
    """
    entering = []
    for number in range(segments.begins_Bn.shape[1]):
        goes_on_B, is_full_B = ~segments.begins_Bn[:, number], segments.is_full_Bn[:, number]
        committed, pending = committed.where(goes_on_B), pending.where(goes_on_B)
        entering.append(committed)
        k_BGSd, v_BGSd = segments.k_BnGSd[:, number], segments.v_BnGSd[:, number]
        v_BGSd = v_BGSd - read(k_BGSd, committed, segments.is_first_Bn[:, number])
        pending = pending + write(k_BGSd, v_BGSd, segments.filled_BnS[:, number])
        committed, pending = committed + pending.where(is_full_B), pending.where(~is_full_B)
    stacked = Memory(
        torch.stack([each.matrix for each in entering], dim=1),
        torch.stack([each.total for each in entering], dim=1),
    )
    return stacked, committed, pending
