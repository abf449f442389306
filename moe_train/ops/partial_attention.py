"""Attention over a part of the keys, with what is needed to merge it with another part, and its gradients.

PyTorch's kernels return the logsumexp of the scores without a gradient. So whoever merges parts computes the gradients
in a function of its own: the backward pass of each part, with the output and logsumexp of all parts together, gives
exactly that part's share of the gradients.
Legend: B batch, H query heads, G key/value heads, S queries, C keys, d head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_CPU_KERNEL = frozenset({"cpu"})  # device types of the kernel that takes masks, grouped heads and any dtype
# What the flash kernel on CUDA takes. PyTorch's own attention pads other head sizes; the bare operation refuses them.
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_HEAD_STEP, _MOST_FLASH_HEAD = 8, 256
_FIRST_FLASH_CAPABILITY = (8, 0)


def partial_attention(
    q_BHSd: Tensor, k_BGCd: Tensor, v_BGCd: Tensor, mask_B1SC: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Compute attention and the logsumexp of its scores, without a gradient; head i reads key/value head i // (H/G).

    Args:
        q_BHSd: Queries.
        k_BGCd: Keys; G must divide H.
        v_BGCd: Values.
        mask_B1SC: Mask in the queries' dtype that is added to the scores, from `additive`; None: there is none.
        is_causal: Whether a query sees only the keys up to its own place (S = C, and no mask).

    Returns:
        [B, H, S, d], the outputs, and [B, H, S], the logsumexp, fp32 or wider. A query must see a key: otherwise its
        output is 0 and its logsumexp means nothing.
    """
    if q_BHSd.device.type in _HAS_CPU_KERNEL:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q_BHSd, k_BGCd, v_BGCd, 0.0, is_causal, attn_mask=mask_B1SC)
    if _takes_flash(q_BHSd, mask_B1SC):
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHSd, k_BGCd, v_BGCd, 0.0, is_causal)[:2]
    scores = _scores(q_BHSd, k_BGCd, mask_B1SC, is_causal)
    lse = scores.logsumexp(-1).masked_fill_((scores == -math.inf).all(-1), 0.0)
    shares = torch.exp(scores - lse.unsqueeze(-1))
    return (shares @ _of_heads(v_BGCd, q_BHSd).to(shares.dtype)).to(q_BHSd.dtype), lse


def partial_attention_backward(
    gradient_BHSd: Tensor,
    q_BHSd: Tensor,
    k_BGCd: Tensor,
    v_BGCd: Tensor,
    out_BHSd: Tensor,
    lse_BHS: Tensor,
    mask_B1SC: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one part's share of the gradients of merged attention.

    Args:
        gradient_BHSd: Gradient of the merged output.
        q_BHSd: Queries.
        k_BGCd: Keys of the part.
        v_BGCd: Values of the part.
        out_BHSd: Merged output.
        lse_BHS: Merged logsumexp.
        mask_B1SC: Mask of the part, as in `partial_attention`.
        is_causal: As in `partial_attention`.

    Returns:
        Gradients of the queries, keys and values.
    """
    gradient_BHSd, arguments = gradient_BHSd.contiguous(), (q_BHSd, k_BGCd, v_BGCd, out_BHSd, lse_BHS)
    if q_BHSd.device.type in _HAS_CPU_KERNEL:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(gradient_BHSd, *arguments, 0.0, is_causal, attn_mask=mask_B1SC)
    if _takes_flash(q_BHSd, mask_B1SC):
        length, none = q_BHSd.shape[2], torch.empty(0, dtype=torch.uint64, device=q_BHSd.device)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
        return kernel(gradient_BHSd, *arguments, None, None, length, k_BGCd.shape[2], 0.0, is_causal, none, none)
    # The shares of all keys in the softmax are exp(score - merged logsumexp), and D = sum(gradient x merged output).
    shares = torch.exp(_scores(q_BHSd, k_BGCd, mask_B1SC, is_causal) - lse_BHS.unsqueeze(-1))
    wide, kv_heads, scale = shares.dtype, k_BGCd.shape[1], q_BHSd.shape[3] ** -0.5
    gradient, k, v = gradient_BHSd.to(wide), _of_heads(k_BGCd, q_BHSd).to(wide), _of_heads(v_BGCd, q_BHSd).to(wide)
    correction = (gradient * out_BHSd.to(wide)).sum(-1, keepdim=True)
    slopes = shares * (gradient @ v.mT - correction) * scale

    def of_groups(x_BHCd: Tensor) -> Tensor:
        return x_BHCd.unflatten(1, (kv_heads, -1)).sum(2)

    gradients = slopes @ k, of_groups(slopes.mT @ q_BHSd.to(wide)), of_groups(shares.mT @ gradient)
    return gradients[0].to(q_BHSd.dtype), gradients[1].to(k_BGCd.dtype), gradients[2].to(v_BGCd.dtype)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attention of the same queries over two disjoint parts of the keys.

    Args:
        out_a: [..., d], outputs over the first part.
        lse_a: [...], logsumexp of the first part, fp32 or wider; finite.
        out_b: Outputs over the second part.
        lse_b: Logsumexp of the second part; finite.

    Returns:
        Merged outputs, in the dtype of the parts, and merged logsumexp.
    """
    share = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    out = out_a - share * (out_a - out_b)  # in the wider dtype of the shares
    return out.to(out_a.dtype), lse_a - F.logsigmoid(lse_a - lse_b)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask, True where the key is visible, to one that is added to the scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def takes_long_rows(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether causal attention takes memory linear in the number of keys: a kernel that stores no scores is there.

    Args:
        device: Device of the queries.
        dtype: dtype of the queries.
        head_dim: d, head size.
    """
    return device.type in _HAS_CPU_KERNEL or takes_flash(device, dtype, head_dim)


def takes_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether the flash kernel of CUDA is for such queries; arguments as of `takes_long_rows`."""
    if (
        device.type != "cuda"
        or dtype not in _FLASH_DTYPES
        or head_dim > _MOST_FLASH_HEAD
        or head_dim % _FLASH_HEAD_STEP
    ):
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_FLASH_CAPABILITY


def _takes_flash(q_BHSd: Tensor, mask_B1SC: Tensor | None) -> bool:
    return mask_B1SC is None and takes_flash(q_BHSd.device, q_BHSd.dtype, q_BHSd.shape[3])


def _of_heads(x_BGCd: Tensor, q_BHSd: Tensor) -> Tensor:
    return x_BGCd.repeat_interleave(q_BHSd.shape[1] // x_BGCd.shape[1], dim=1)


def _scores(q_BHSd: Tensor, k_BGCd: Tensor, mask_B1SC: Tensor | None, is_causal: bool) -> Tensor:
    """Compute scaled scores with the mask added, fp32 or wider. [B, H, S, C]."""
    wide = torch.promote_types(q_BHSd.dtype, torch.float32)
    scores = (q_BHSd.to(wide) * q_BHSd.shape[3] ** -0.5) @ _of_heads(k_BGCd, q_BHSd).to(wide).mT
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores if mask_B1SC is None else scores + mask_B1SC
