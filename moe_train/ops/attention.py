"""Causal attention with grouped keys and values.

Legend: B batch, H query heads, G key/value heads, S queries, C keys (context), d head size.
"""

import torch.nn.functional as F
from torch import Tensor


def causal_mask(
    positions_BS: Tensor, key_positions_BC: Tensor, documents_BS: Tensor | None, key_documents_BC: Tensor | None
) -> Tensor:
    """Which keys a query may see: those at or before its position and, given document ids, of its document.

    Args:
        positions_BS: int64 positions of the queries.
        key_positions_BC: int64 positions of the keys.
        documents_BS: int64 document ids of the queries, or None.
        key_documents_BC: int64 document ids of the keys, or None.

    Returns:
        bool [B, 1, S, C], True where the key is visible.
    """
    mask = key_positions_BC[:, None, None, :] <= positions_BS[:, None, :, None]
    if documents_BS is not None and key_documents_BC is not None:
        mask = mask & (key_documents_BC[:, None, None, :] == documents_BS[:, None, :, None])
    return mask


def attend(q_BHSd: Tensor, k_BGCd: Tensor, v_BGCd: Tensor, mask_B1SC: Tensor | None) -> Tensor:
    """Scaled dot-product attention; query head i reads key/value head i // (H/G).

    Args:
        q_BHSd: Queries.
        k_BGCd: Keys, G dividing H.
        v_BGCd: Values.
        mask_B1SC: bool, True where visible; None: causal, with S = C.

    Returns:
        [B, H, S, d].
    """
    groups = q_BHSd.shape[1] // k_BGCd.shape[1]
    if groups > 1 and mask_B1SC is not None and q_BHSd.is_cuda:
        # With a mask only the memory-efficient kernel is left, and it wants a key and value head for every query head.
        k_BGCd, v_BGCd = (x.repeat_interleave(groups, dim=1) for x in (k_BGCd, v_BGCd))
    return F.scaled_dot_product_attention(
        q_BHSd,
        k_BGCd,
        v_BGCd,
        attn_mask=mask_B1SC,
        is_causal=mask_B1SC is None,
        enable_gqa=q_BHSd.shape[1] != k_BGCd.shape[1],
    )
