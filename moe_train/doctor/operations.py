"""Collective operations that training uses, on patterns whose right result every rank knows. All numbers are exact.

Legend: n elements of a rank's buffer, P ranks of the group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.distributed.collectives import Group, group_rank, group_size

OPERATIONS = ("all_to_all", "all_reduce", "all_gather", "ring")
# The dtypes that training sends: activations and gradients, counts, and fp8 rows as bytes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
_LARGEST = 199  # integers up to 256 are exact in bf16, and up to 255 in a byte


@dataclass(frozen=True)
class Prepared:
    """One operation with its buffers, ready to run several times.

    Attributes:
        run: Runs the operation once.
        is_right: Returns whether the buffers hold the right result, after the first run.
        sent_bytes: Bytes that a rank sends to other ranks in one run: (P - 1)/P of its buffer; twice that for an
            all-reduce; all of it for a hop of a ring.
    """

    run: Callable[[], None]
    is_right: Callable[[], bool]
    sent_bytes: float


def prepare(
    operation: str, num_bytes: int, dtype: torch.dtype, device: torch.device, group: Group, uneven: bool = False
) -> Prepared:
    """Allocate and fill the buffers of an operation.

    Args:
        operation: One of OPERATIONS.
        num_bytes: Size of the whole buffer: a rank's rows, the tensor to sum, the gathered tensor, or what a rank
            sends to the next one.
        dtype: Dtype of the elements.
        device: Device of this rank.
        group: Process group.
        uneven: For an all-to-all: blocks of different sizes, some of them empty.
    """
    size = group_size(group)
    share = max(1, num_bytes // dtype.itemsize // size)
    if operation == "all_to_all":
        return _all_to_all(share, dtype, device, group, uneven)
    if operation == "all_reduce":
        return _all_reduce(share * size, dtype, device, group)
    if operation == "ring":
        return _ring(share * size, dtype, device, group)
    return _all_gather(share, dtype, device, group)


def _pattern(num: int, source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the values that source sends to target, [num]."""
    places = torch.arange(num, device=device, dtype=torch.int64)
    return ((places * 7 + source * 31 + target * 17) % _LARGEST).to(dtype)


def _blocks(
    lengths: Sequence[int], pairs: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.cat([_pattern(n, *pair, dtype, device) for n, pair in zip(lengths, pairs, strict=True)])


def _all_to_all(share: int, dtype: torch.dtype, device: torch.device, group: Group, uneven: bool) -> Prepared:
    rank, size = group_rank(group), group_size(group)

    def length(source: int, target: int) -> int:
        return share * ((source * 3 + target * 2) % 4) if uneven else share  # zero, one, two or three shares

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
    # Each element has its number from one rank and 1 from the next rank, so its sum is small for any number of ranks.
    places = torch.arange(num, device=device, dtype=torch.int64)
    values = places * 7 % _LARGEST
    given = (values * (places % size == rank) + ((places + 1) % size == rank)).to(dtype)
    wanted, result = (values + 1).to(dtype), given.clone()

    def run() -> None:
        # In place: later runs add up to larger sums, even infinity, which takes no longer.
        dist.all_reduce(result, group=group)

    return Prepared(run, lambda: torch.equal(result, wanted), 2 * (size - 1) / size * num * dtype.itemsize)


def _all_gather(share: int, dtype: torch.dtype, device: torch.device, group: Group) -> Prepared:
    rank, size = group_rank(group), group_size(group)
    given = _pattern(share, rank, 0, dtype, device)
    wanted = _blocks([share] * size, [(other, 0) for other in range(size)], dtype, device)
    result = torch.empty_like(wanted)
    # torch 2.13 warns about the old name; torch 2.11 has only the old one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def run() -> None:
        gather(result, given, group=group)

    return Prepared(run, lambda: torch.equal(result, wanted), (size - 1) * share * dtype.itemsize)


def _ring(num: int, dtype: torch.dtype, device: torch.device, group: Group) -> Prepared:
    """One hop, as keys and values of a shared sequence make it: to the next rank, and from the one before."""
    rank, size = group_rank(group), group_size(group)
    before, after = (rank - 1) % size, (rank + 1) % size
    given, wanted = (_pattern(num, source, 0, dtype, device) for source in (rank, before))
    result = torch.empty_like(wanted)
    operations = [
        dist.P2POp(dist.isend, given, group=group, group_peer=after),
        dist.P2POp(dist.irecv, result, group=group, group_peer=before),
    ]

    def run() -> None:
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return Prepared(run, lambda: torch.equal(result, wanted), num * dtype.itemsize)
