"""The collective operations that training uses, on patterns whose right result each rank knows. All numbers are exact.

Legend: n elements of a rank's buffer, P ranks of the group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.distributed.collectives import Group, group_rank, group_size

OPERATIONS = ("all_to_all", "all_reduce", "all_gather")
# What travels in training: activations and gradients, counts, and rows in fp8 as bytes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
_LARGEST = 199  # whole numbers to 256 are exact in bf16, and to 255 in a byte


@dataclass(frozen=True)
class Prepared:
    """One operation with its buffers, to be run several times.

    Attributes:
        run: Does it once.
        is_right: Whether the buffers hold what they should, after one run.
        sent_bytes: That a rank sends to others in one run: (P - 1)/P of its bytes; twice that for an all-reduce.
    """

    run: Callable[[], None]
    is_right: Callable[[], bool]
    sent_bytes: float


def prepare(
    operation: str, num_bytes: int, dtype: torch.dtype, device: torch.device, group: Group, uneven: bool = False
) -> Prepared:
    """Buffers for an operation.

    Args:
        operation: One of OPERATIONS.
        num_bytes: Of the whole buffer: of a rank's rows, of the tensor that is summed, of what is gathered.
        dtype: Of its elements.
        device: Of this rank.
        group: Of ranks.
        uneven: Of an all-to-all: blocks of different sizes, with empty ones.
    """
    size = group_size(group)
    share = max(1, num_bytes // dtype.itemsize // size)
    if operation == "all_to_all":
        return _all_to_all(share, dtype, device, group, uneven)
    if operation == "all_reduce":
        return _all_reduce(share * size, dtype, device, group)
    return _all_gather(share, dtype, device, group)


def _pattern(num: int, source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What source sends to target, [num]."""
    places = torch.arange(num, device=device, dtype=torch.int64)
    return ((places * 7 + source * 31 + target * 17) % _LARGEST).to(dtype)


def _blocks(
    lengths: Sequence[int], pairs: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.cat([_pattern(n, *pair, dtype, device) for n, pair in zip(lengths, pairs, strict=True)])


def _all_to_all(share: int, dtype: torch.dtype, device: torch.device, group: Group, uneven: bool) -> Prepared:
    rank, size = group_rank(group), group_size(group)

    def length(source: int, target: int) -> int:
        return share * ((source * 3 + target * 2) % 4) if uneven else share  # none, one, two or three shares

    send = [length(rank, other) for other in range(size)]
    receive = [length(other, rank) for other in range(size)]
    given = _blocks(send, [(rank, other) for other in range(size)], dtype, device)
    wanted = _blocks(receive, [(other, rank) for other in range(size)], dtype, device)
    result = torch.empty_like(wanted)

    def run() -> None:
        dist.all_to_all_single(result, given, receive, send, group=group)

    sent = (sum(send) - send[rank]) * dtype.itemsize
    return Prepared(run, lambda: torch.equal(result, wanted), sent)


def _all_reduce(num: int, dtype: torch.dtype, device: torch.device, group: Group) -> Prepared:
    rank, size = group_rank(group), group_size(group)
    # Each element has its number from one rank and 1 from the next: a sum that is small, however many ranks there are.
    places = torch.arange(num, device=device, dtype=torch.int64)
    values = places * 7 % _LARGEST
    given = (values * (places % size == rank) + ((places + 1) % size == rank)).to(dtype)
    wanted, result = (values + 1).to(dtype), given.clone()

    def run() -> None:
        # In place: the sums of later runs grow, up to infinity, which takes no longer.
        dist.all_reduce(result, group=group)

    return Prepared(run, lambda: torch.equal(result, wanted), 2 * (size - 1) / size * num * dtype.itemsize)


def _all_gather(share: int, dtype: torch.dtype, device: torch.device, group: Group) -> Prepared:
    rank, size = group_rank(group), group_size(group)
    given = _pattern(share, rank, 0, dtype, device)
    wanted = _blocks([share] * size, [(other, 0) for other in range(size)], dtype, device)
    result = torch.empty_like(wanted)
    # torch 2.13 warns of the old name; 2.11 has no other.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def run() -> None:
        gather(result, given, group=group)

    return Prepared(run, lambda: torch.equal(result, wanted), (size - 1) * share * dtype.itemsize)
