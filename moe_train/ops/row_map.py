"""Map between source rows and their copies: each of N sources has any number of the R places.

A gather copies to every place the row of its source. A sum adds up the places of each source. Each is the gradient of
the other.
Legend: N sources, R places, D width of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.ops.kernels import kernels_for
from moe_train.ops.permute import invert_order, sort_keys


@dataclass(frozen=True)
class RowMap:
    """Map from every place to the source that it is a copy of.

    Attributes:
        source_R: int64, the source of every place.
        num_sources: N, number of sources.
        group_places: Called once, at the first use of `places_R` or `offsets_N`; returns both.
    """

    source_R: Tensor
    num_sources: int
    group_places: Callable[[], tuple[Tensor, Tensor]]

    @cached_property
    def _by_source(self) -> tuple[Tensor, Tensor]:
        return self.group_places()

    @property
    def places_R(self) -> Tensor:
        """Places ordered by their source, int64 [R]."""
        return self._by_source[0]

    @property
    def offsets_N(self) -> Tensor:
        """Start of each source's places in `places_R`, int64 [N]."""
        return self._by_source[1]

    @staticmethod
    def of(source_R: Tensor, num_sources: int) -> "RowMap":
        """Make a map from the source of every place.

        Args:
            source_R: int64, the source of every place, below num_sources.
            num_sources: N, number of sources.
        """

        def group_places() -> tuple[Tensor, Tensor]:
            counts_N = torch.zeros(num_sources, dtype=torch.int64, device=source_R.device)
            counts_N.scatter_add_(0, source_R, torch.ones_like(source_R))  # bincount reads its maximum on the host
            return torch.argsort(sort_keys(source_R, num_sources), stable=True), counts_N.cumsum(0) - counts_N

        return RowMap(source_R, num_sources, group_places)

    @staticmethod
    def of_order(order_R: Tensor, copies: int) -> "RowMap":
        """Make a map from an order of all copies; source n has the copies n*copies .. n*copies + copies - 1.

        Args:
            order_R: int64, the number of the copy at every place.
            copies: Number of copies of each source.
        """

        def group_places() -> tuple[Tensor, Tensor]:
            return invert_order(order_R), torch.arange(0, order_R.numel(), copies, device=order_R.device)

        source_R = order_R // copies if copies > 1 else order_R
        return RowMap(source_R, order_R.numel() // copies, group_places)

    @staticmethod
    def of_table(is_place_PN: Tensor, num_places: int) -> "RowMap":
        """Make a map from a table: its true elements, row by row, are the places, and their columns are the sources.

        Args:
            is_place_PN: bool, P blocks of N sources.
            num_places: R, the number of true elements, given so that the host need not read it from the device.
        """

        def group_places() -> tuple[Tensor, Tensor]:
            counts_N = is_place_PN.sum(0)
            places_R = _pick(_count_up(is_place_PN).t(), is_place_PN.t(), num_places)
            return places_R, counts_N.cumsum(0) - counts_N

        num_sources = is_place_PN.shape[1]
        source_PN = torch.arange(num_sources, device=is_place_PN.device).expand_as(is_place_PN)
        return RowMap(_pick(source_PN, is_place_PN, num_places), num_sources, group_places)

    def moved_to(self, place_R: Tensor, num_places: int) -> "RowMap":
        """Make a map with the same copies at other places.

        The places between them are copies of source 0 in a gather, and are in no sum.

        Args:
            place_R: int64, the new place of every place, each of them another.
            num_places: Number of places of the new map.
        """

        def group_places() -> tuple[Tensor, Tensor]:
            return place_R.index_select(0, self.places_R), self.offsets_N

        source = self.source_R.new_zeros(num_places).index_copy_(0, place_R, self.source_R)
        return RowMap(source, self.num_sources, group_places)

    def gather(self, rows_ND: Tensor) -> Tensor:
        """Copy to every place the row of its source, [N, D] -> [R, D], without gradient."""
        if kernels := kernels_for(rows_ND):
            return kernels.gather_rows(rows_ND, self.source_R)
        return rows_ND.index_select(0, self.source_R)

    def sum_rows(self, rows_RD: Tensor) -> Tensor:
        """Sum the places of each source, [R, D] -> [N, D], in at least fp32 and rounded once, without gradient."""
        if kernels := kernels_for(rows_RD):
            return kernels.sum_rows(rows_RD, self.places_R, self.offsets_N)
        if self.places_R.numel() == 0 or self.num_sources == 0:
            return rows_RD.new_zeros(self.num_sources, rows_RD.shape[1])
        # One pass gathers and adds: on CPU 8 to 16 times as fast as a gather, a cast and a sum (bf16, D = 512).
        return F.embedding_bag(self.places_R, rows_RD, self.offsets_N, mode="sum")


def _count_up(is_counted: Tensor) -> Tensor:
    """Number the true elements row by row, from 0. int64."""
    return (is_counted.flatten().cumsum(0) - 1).view_as(is_counted)


def _pick(values: Tensor, is_picked: Tensor, num_picked: int) -> Tensor:
    """Pick the values at the true elements, row by row, without `nonzero`, which reads their number on the host."""
    slots = torch.where(is_picked, _count_up(is_picked), num_picked).flatten()
    picked = values.new_empty(num_picked + 1)  # the last slot takes all values that are not picked
    return picked.scatter_(0, slots, values.flatten())[:num_picked]


class _Move(torch.autograd.Function):
    """Gather or sum by a map; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_map: RowMap, sums: bool) -> Tensor:
        ctx.row_map, ctx.sums = row_map, sums
        return row_map.sum_rows(rows) if sums else row_map.gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        row_map: RowMap = ctx.row_map
        return row_map.gather(grads[0]) if ctx.sums else row_map.sum_rows(grads[0].contiguous()), None, None


def gather_rows(rows_ND: Tensor, row_map: RowMap) -> Tensor:
    """Copy to every place the row of its source.

    Args:
        rows_ND: Rows of the sources.
        row_map: Source of every place.

    Returns:
        [R, D]. Its gradient is summed in an order that does not depend on the threads of the device.
    """
    return _Move.apply(rows_ND, row_map, False)


def scatter_add_rows(rows_RD: Tensor, row_map: RowMap) -> Tensor:
    """Sum the places of each source, accumulated in at least fp32.

    Args:
        rows_RD: Rows of the places.
        row_map: Source of every place.

    Returns:
        [N, D] in the dtype of the rows.
    """
    return _Move.apply(rows_RD, row_map, True)
