"""The form in which rows travel between ranks: as they are, or in fewer bits.

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
    """A form of rows.

    Attributes:
        name: model: the rows' own dtype. bf16: rounded to it. fp8: every row by its largest magnitude, which travels
            with it in fp32, in e4m3: relative error up to 1/16 of an element that is not tiny beside the row's largest.
    """

    name: PayloadName = "model"

    def encode(self, rows_RD: Tensor) -> Tensor:
        """What is sent: [R, D] of the rows' dtype or bf16, or uint8 [R, 4 + D]."""
        if self.name == "bf16":
            return rows_RD.to(torch.bfloat16)
        return encode_fp8(rows_RD) if self.name == "fp8" else rows_RD

    def decode(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows again, [R, D].

        Args:
            sent: From `encode`.
            dtype: Of the rows.
        """
        if self.name == "fp8":
            return decode_fp8(sent, dtype)
        return sent.to(dtype)


MODEL_PAYLOAD = Payload()


def encode_fp8(rows_RD: Tensor) -> Tensor:
    """Rows in e4m3, each divided by its scale, and before them the four bytes of the scale. uint8 [R, 4 + D].

    A row of zeros has scale 1. A row with an infinite or undefined element comes back undefined in all of its elements,
    so that what watches for bad numbers sees it.
    """
    rows = rows_RD.to(torch.float32)
    largest_R1 = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    scale_R1 = torch.where(largest_R1 == 0, 1.0, largest_R1 / _FP8_MAX).to(torch.float32)  # NaN stays NaN
    # A largest element that is tiny (below 448 of the smallest fp32) has a scale that is zero: such a row is zeros.
    scaled_RD = torch.where(scale_R1 == 0, 0.0, rows / scale_R1)
    return torch.cat((scale_R1.view(torch.uint8), scaled_RD.to(_FP8).view(torch.uint8)), dim=1)


def decode_fp8(sent: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of `encode_fp8`. [R, D] of the dtype."""
    scale_R1 = torch.empty(len(sent), 1, dtype=torch.float32, device=sent.device)
    scale_R1.view(torch.uint8).copy_(sent[:, :_SCALE_BYTES])  # a row's length need not be a multiple of four bytes
    values = sent[:, _SCALE_BYTES:].contiguous().view(_FP8)
    return (values.to(torch.float32) * scale_R1).to(dtype)
