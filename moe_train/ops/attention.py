"""Causal attention with grouped keys and values.

Legend: B batch, H query heads, G key/value heads, S queries, C keys (context), d head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_train.ops.products import widens

# Without cuDNN, which CUDA prefers on new GPUs: with a mask its gradients can be NaN (pytorch#196678), and on Blackwell
# it decodes wrongly with fewer than 8 key heads (pytorch#193893).
_SAFE_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHORT = 256  # queries; on a Sapphire Rapids with AMX the kernels are equally fast at about this length


def visible_keys(
    positions_BS: Tensor,
    key_positions_BC: Tensor,
    documents_BS: Tensor | None,
    key_documents_BC: Tensor | None,
    window: int | None = None,
) -> Tensor:
    """Mark the keys that each query sees: keys at or before its position, in its window and in its document.

    Args:
        positions_BS: int64 positions of the queries.
        key_positions_BC: int64 positions of the keys.
        documents_BS: int64 document ids of the queries; None: documents are not isolated.
        key_documents_BC: int64 document ids of the keys; None: documents are not isolated.
        window: Most positions that a query sees, its own included; None: all.

    Returns:
        bool [B, 1, S, C], True where the query sees the key.
    """
    queries_B1S1, keys_B11C = positions_BS[:, None, :, None], key_positions_BC[:, None, None, :]
    mask = keys_B11C <= queries_B1S1
    if window is not None:
        mask = mask & (keys_B11C > queries_B1S1 - window)
    if documents_BS is not None and key_documents_BC is not None:
        mask = mask & (key_documents_BC[:, None, None, :] == documents_BS[:, None, :, None])
    return mask


def attend(q_BHSd: Tensor, k_BGCd: Tensor, v_BGCd: Tensor, mask_B1SC: Tensor | None) -> Tensor:
    """Compute scaled dot-product attention; query head i reads key/value head i // (H/G).

    Args:
        q_BHSd: Queries.
        k_BGCd: Keys; G must divide H.
        v_BGCd: Values.
        mask_B1SC: bool, True where the query sees the key. None: a single query sees every key; several queries (with
            S = C) each see the keys up to their own.

    Returns:
        [B, H, S, d], the outputs of all heads.
    """
    batch, heads, length, size = q_BHSd.shape
    kv_heads = k_BGCd.shape[1]
    if _is_faster_in_fp32(q_BHSd):
        q, k, v = q_BHSd.float(), k_BGCd.float(), v_BGCd.float()
        return attend(q, k, v, mask_B1SC).to(q_BHSd.dtype)
    if mask_B1SC is None and length > 1:
        return F.scaled_dot_product_attention(q_BHSd, k_BGCd, v_BGCd, is_causal=True, enable_gqa=kv_heads != heads)
    # The query heads of a group become further queries of one head. So its keys and values are read once and not
    # copied. Kernels that take a mask need as many key heads as query heads, on CPU and on CUDA.
    groups = heads // kv_heads
    q_BGsd = q_BHSd.reshape(batch, kv_heads, groups * length, size)  # (B, G*r, S, d) -> (B, G, r*S, d)
    if mask_B1SC is not None and groups > 1:
        # (B, 1, S, C) -> (B, 1, r, S, C) -> (B, 1, r*S, C)
        mask_B1SC = mask_B1SC.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(2, 3)
    with sdpa_kernel(_SAFE_KERNELS):
        mixed_BGsd = F.scaled_dot_product_attention(q_BGsd, k_BGCd, v_BGCd, attn_mask=mask_B1SC)
    # (B, G, r*S, d) -> (B, G*r, S, d); not a view, because the memory-efficient kernel returns another memory order.
    return mixed_BGsd.reshape(q_BHSd.shape)


def _is_faster_in_fp32(q_BHSd: Tensor) -> bool:
    """Return whether the kernel for bf16 is slower than casts and the kernel for fp32.

    It is where sequences are short, because of its backward pass, and at any length on a CPU that multiplies fp32
    faster. A single query reads a cache once, which is not copied.
    """
    length = q_BHSd.shape[2]
    if q_BHSd.device.type != "cpu" or q_BHSd.dtype != torch.bfloat16 or length == 1:
        return False
    return length <= SHORT or widens(q_BHSd)
