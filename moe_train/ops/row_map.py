"""Rows that are copies of other rows: each of N sources stands at any number of R places.

Spreading takes every place its source's row; summing adds up each source's places. One is the other's gradient.
Legend: N sources, R places, D width of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowMap:
    """Which source each place is a copy of.

    Attributes:
        source_R: int64, the source of every place.
        places_R: int64, the places ordered by their source.
        offsets_N: int64, where each source's places begin in `places_R`.
    """

    source_R: Tensor
    places_R: Tensor
    offsets_N: Tensor

    @property
    def num_sources(self) -> int:
        """N."""
        return self.offsets_N.shape[0]

    @staticmethod
    def of(source_R: Tensor, num_sources: int) -> "RowMap":
        """The map of given sources.

        Args:
            source_R: int64, the source of every place, below num_sources.
            num_sources: N.
        """
        counts_N = torch.zeros(num_sources, dtype=torch.int64, device=source_R.device)
        counts_N.scatter_add_(0, source_R, torch.ones_like(source_R))  # not bincount: it reads its maximum on the host
        return RowMap(source_R, torch.argsort(source_R, stable=True), counts_N.cumsum(0) - counts_N)

    @staticmethod
    def of_order(order_R: Tensor, inverse_R: Tensor, copies: int) -> "RowMap":
        """The map of an order of all copies: source n's are numbers n*copies .. n*copies + copies - 1.

        Args:
            order_R: int64, the number of the copy at every place.
            inverse_R: int64, the place of every copy.
            copies: Of each source.
        """
        offsets_N = torch.arange(0, order_R.numel(), copies, device=order_R.device)
        return RowMap(order_R // copies if copies > 1 else order_R, inverse_R, offsets_N)

    def spread_rows(self, rows_ND: Tensor) -> Tensor:
        """Every place's row. [R, D], without gradient."""
        return rows_ND.index_select(0, self.source_R)

    def sum_rows(self, rows_RD: Tensor) -> Tensor:
        """The sum of each source's places, accumulated in at least fp32 and rounded once. [N, D], without gradient."""
        if self.places_R.numel() == 0 or self.num_sources == 0:
            return rows_RD.new_zeros(self.num_sources, rows_RD.shape[1])
        # One pass that gathers and adds: 8 to 16 times as fast as a gather, a cast and a sum on CPU (bf16, D = 512).
        return F.embedding_bag(self.places_R, rows_RD, self.offsets_N, mode="sum")


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        return row_map.spread_rows(rows_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.row_map.sum_rows(grads[0].contiguous()), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        return row_map.sum_rows(rows_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.row_map.spread_rows(grads[0]), None


def spread(rows_ND: Tensor, row_map: RowMap) -> Tensor:
    """Every place's row, [R, D]; its gradient is summed in an order that does not depend on the device's threads."""
    return _Spread.apply(rows_ND, row_map)


def sum_places(rows_RD: Tensor, row_map: RowMap) -> Tensor:
    """The sum of each source's places, [N, D], accumulated in at least fp32."""
    return _Sum.apply(rows_RD, row_map)
