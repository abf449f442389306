"""Matrix products of all experts at once, where rows are in the order of their experts.

torch's grouped kernel needs no counts on the host. Where torch 2.13 has none (it takes bf16 on compute capability 9 and
10), `F.grouped_mm` computes one expert after the other and reads the offsets on the host in each of six products. So
there the counts are read once, and the products are made here.
Legend: R rows, M and N their widths, e experts of this rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNEL_CAPABILITIES = (9, 10)  # major compute capabilities for which torch 2.13 has a grouped kernel, in bf16
_FIRST_WITH_GARBAGE = (
    10  # major compute capability whose kernel leaves an empty expert's gradient unset (pytorch#172439)
)
_ALIGNMENT = 16  # bytes of which a row must have a multiple


@dataclass(frozen=True)
class ExpertRows:
    """Number of rows of each expert, in the form that the products need.

    Attributes:
        offsets_e: int32, the end of each expert's rows.
        counts: Rows of each expert, on the host; None: torch's kernel needs no numbers.
        clears_empty: Whether the gradient of an expert without rows has to be set to zero.
    """

    offsets_e: Tensor
    counts: tuple[int, ...] | None
    clears_empty: bool

    @staticmethod
    def of(counts_e: Tensor, dtype: torch.dtype) -> "ExpertRows":
        """Make it from the counts on the device.

        Args:
            counts_e: int64, rows of each expert.
            dtype: dtype of the rows.
        """
        offsets_e, major = counts_e.cumsum(0).to(torch.int32), 0
        if counts_e.device.type == "cuda":
            major = torch.cuda.get_device_capability(counts_e.device)[0]
            if dtype != torch.bfloat16 or major not in _KERNEL_CAPABILITIES:
                # Host synchronisation: one for a layer, in place of one for each product.
                return ExpertRows(offsets_e, tuple(counts_e.tolist()), clears_empty=False)
        return ExpertRows(offsets_e, None, clears_empty=major >= _FIRST_WITH_GARBAGE)


def takes_grouped_products(rows_RM: Tensor, weight_eMN: Tensor) -> bool:
    """Tell whether the products take such rows and weights: torch 2.13 refuses fp64, and rows that are not aligned.

    Args:
        rows_RM: Rows of the experts.
        weight_eMN: Weights of the experts.
    """
    if not hasattr(F, "grouped_mm") or rows_RM.dtype not in DTYPES:  # public since torch 2.10
        return False
    return all(width * rows_RM.element_size() % _ALIGNMENT == 0 for width in weight_eMN.shape[1:])


def rows_product(x_RM: Tensor, weight_eMN: Tensor, rows: ExpertRows) -> Tensor:
    """Multiply every row by the weight of its expert. [R, N] in the dtype of the rows.

    Args:
        x_RM: Rows in the order of experts; those after the counted ones have no expert, and their result is undefined.
        weight_eMN: Weights of the experts.
        rows: Number of rows of each expert.
    """
    if len(x_RM) == 0:  # CUDA's kernel would get a null pointer (Megatron-LM#4851)
        return x_RM.new_empty(0, weight_eMN.shape[2])
    if rows.counts is None:
        return F.grouped_mm(x_RM, weight_eMN, offs=rows.offsets_e)
    out_RN = x_RM.new_empty(len(x_RM), weight_eMN.shape[2])
    counted = sum(rows.counts)
    parts = x_RM[:counted].split(rows.counts), weight_eMN.unbind(0), out_RN[:counted].split(rows.counts)
    for x_rM, weight_MN, out_rN in zip(*parts, strict=True):
        if len(x_rM):
            torch.mm(x_rM, weight_MN, out=out_rN)
    return out_RN


def weights_product(x_RM: Tensor, y_RN: Tensor, rows: ExpertRows) -> Tensor:
    """Sum, for every expert, the outer products of its rows of both. [e, M, N]; zero for an expert without rows.

    Args:
        x_RM: Rows in the order of experts.
        y_RN: Other rows in the same order.
        rows: Number of rows of each expert.
    """
    shape = len(rows.offsets_e), x_RM.shape[1], y_RN.shape[1]
    if len(x_RM) == 0:
        return x_RM.new_zeros(shape)
    if rows.counts is None:
        out_eMN = F.grouped_mm(x_RM.t(), y_RN, offs=rows.offsets_e)
        if rows.clears_empty:
            is_empty_e = rows.offsets_e.diff(prepend=rows.offsets_e.new_zeros(1)) == 0
            out_eMN.masked_fill_(is_empty_e[:, None, None], 0.0)
        return out_eMN
    out_eMN, counted = x_RM.new_empty(shape), sum(rows.counts)
    parts = x_RM[:counted].split(rows.counts), y_RN[:counted].split(rows.counts), out_eMN.unbind(0)
    for x_rM, y_rN, out_MN in zip(*parts, strict=True):
        torch.mm(x_rM.t(), y_rN, out=out_MN)  # zero without rows
    return out_eMN
