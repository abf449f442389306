"""Payload: the number format of rows that travel between ranks, unchanged or in fewer bits.

Legend: R rows, D width of a row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PayloadName = Literal["model", "bf16", "fp8"]
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max  # 448
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Payload:
    """Number format of rows that travel between ranks.

    Attributes:
        name: model: rows keep their dtype. bf16: rows are rounded to bf16. fp8: each row is scaled by its largest
            magnitude and rounded to e4m3; the scale travels with it in fp32. The relative error of fp8 is up to 1/16
            for an element that is not tiny beside the largest of its row.
    """

    name: PayloadName = "model"

    def encode(self, rows_RD: Tensor) -> Tensor:
        """Convert rows to the format that is sent.

        Args:
            rows_RD: Rows of a floating dtype.

        Returns:
            [R, D] in the rows' dtype (model) or bf16, or uint8 [R, 4 + D] (fp8).
        """
        if self.name == "bf16":
            return rows_RD.to(torch.bfloat16)
        return encode_fp8(rows_RD) if self.name == "fp8" else rows_RD

    def decode(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert received data back to rows.

        Args:
            sent: Result of `encode`.
            dtype: dtype of the rows.

        Returns:
            [R, D] in this dtype.
        """
        if self.name == "fp8":
            return decode_fp8(sent, dtype)
        return sent.to(dtype)


MODEL_PAYLOAD = Payload()


def encode_fp8(rows_RD: Tensor) -> Tensor:
    """Encode rows in e4m3: the four bytes of a row's fp32 scale, then its elements divided by the scale.

    A row of zeros has scale 1. A row with an infinite or NaN element decodes to NaN in all of its elements, so that
    checks for bad numbers see it.

    Args:
        rows_RD: Rows of a floating dtype.

    Returns:
        uint8 [R, 4 + D].
    """
    rows = rows_RD.to(torch.float32)
    largest_R1 = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    scale_R1 = torch.where(largest_R1 == 0, 1.0, largest_R1 / _FP8_MAX).to(torch.float32)  # NaN stays NaN
    # A tiny largest element (below 448 times the smallest fp32) gives a scale of zero; such a row becomes zeros.
    scaled_RD = torch.where(scale_R1 == 0, 0.0, rows / scale_R1)
    return torch.cat((scale_R1.view(torch.uint8), scaled_RD.to(_FP8).view(torch.uint8)), dim=1)


def decode_fp8(sent: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode the rows of `encode_fp8`.

    Args:
        sent: uint8 [R, 4 + D].
        dtype: dtype of the rows.

    Returns:
        [R, D] in this dtype.
    """
    scale_R1 = torch.empty(len(sent), 1, dtype=torch.float32, device=sent.device)
    scale_R1.view(torch.uint8).copy_(sent[:, :_SCALE_BYTES])  # the length of a row may not be a multiple of four bytes
    values = sent[:, _SCALE_BYTES:].contiguous().view(_FP8)
    return (values.to(torch.float32) * scale_R1).to(dtype)
