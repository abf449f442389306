"""Attention of documents in one flat batch by torch's kernel for rows of any length, on CUDA in 16 bits.

Nothing here waits for the device: where documents begin, and how long the longest is, the host knows with the batch.
Legend: B batch, H query heads, G key/value heads, S positions, T = B*S tokens, N documents, d head size.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_train.ops.partial_attention import takes_flash


def takes_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether the kernel is for such queries, on this device and in this torch.

    Args:
        device: Device of the queries.
        dtype: dtype of the queries.
        head_dim: d, head size.
    """
    return takes_flash(device, dtype, head_dim) and _has_kernel()


def varlen_attention(
    q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, starts_N: Tensor, longest: int, window: int | None
) -> Tensor:
    """Compute causal attention within documents; query head i reads key/value head i // (H/G).

    Args:
        q_BHSd: Queries, bf16 or fp16.
        k_BGSd: Keys; G must divide H.
        v_BGSd: Values.
        starts_N: int32 places in the flattened batch at which documents begin, then B*S.
        longest: Tokens of the longest document.
        window: Most positions that a query sees, its own included; None: all.

    Returns:
        [B, H, S, d], the outputs of all heads.
    """
    from torch.nn.attention.varlen import varlen_attn  # not in every torch; `takes_varlen` has asked

    def flat(x: Tensor) -> Tensor:  # (B, H, S, d) -> (B*S, H, d)
        return x.transpose(1, 2).flatten(0, 1)

    # The kernel counts the positions before the query's own. (-1, 0) is its causal attention without a window.
    reach = (-1 if window is None else window - 1, 0)
    out_THd: Any = varlen_attn(
        flat(q_BHSd),
        flat(k_BGSd),
        flat(v_BGSd),
        starts_N,
        starts_N,
        longest,
        longest,
        window_size=reach,
        enable_gqa=q_BHSd.shape[1] != k_BGSd.shape[1],
    )
    return out_THd.unflatten(0, (q_BHSd.shape[0], q_BHSd.shape[2])).transpose(1, 2)  # (B*S, H, d) -> (B, H, S, d)


@cache
def _has_kernel() -> bool:
    """Tell whether torch's kernel takes windows and grouped heads; the first ones did not."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
