"""Cross-entropy of each token, with the gradient computed in the forward pass.

It takes a few rows at a time, so that no complete fp32 copy of the logits or of their softmax is made. On CPU these
rows fit the cache, which is 6 times as fast as torch's cross-entropy (bf16, 2,048 x 4,096, one core). Where even the
logits of all tokens would be too large, the head is a part of the loss, and both go chunk by chunk.
Legend: N tokens, V vocab_size, D hidden_size.
"""

from typing import Any

import torch
from torch import Tensor

from moe_train.ops.kernels import token_kernels_for
from moe_train.ops.products import mm

IGNORED_TARGET = -100  # target of padding, which has loss 0 and no gradient
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
_LOGITS_BYTES = 1 << 28  # of a chunk of logits, if they are cut; up to twice as many are not
_LEAST_CHUNK = 256  # tokens: fewer would make the products with the weight slow


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        losses_N, slope_NV = _losses_and_slope(logits_NV, targets_N, ctx.needs_input_grad[0])
        if slope_NV is not None:
            ctx.save_for_backward(slope_NV)
            ctx.dtype = logits_NV.dtype
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope_NV,) = ctx.saved_tensors
        grad_NV = torch.empty_like(slope_NV, dtype=ctx.dtype)
        if slope_NV.is_cuda:  # one kernel, without temporary tensors; rounded once, as below
            return torch.mul(slope_NV, grads[0].unsqueeze(1), out=grad_NV), None
        rows = _chunk_rows(slope_NV, grads[0].dtype)
        for start in range(0, slope_NV.shape[0], rows):
            here = slice(start, start + rows)
            # The product is rounded once. 1/N rounded to 16 bits would be wrong by the same factor for every token.
            grad_NV[here] = (slope_NV[here].to(grads[0].dtype) * grads[0][here].unsqueeze(1)).to(ctx.dtype)
        return grad_NV, None


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of the losses of a linear map's logits, with the gradients of its input and weight formed chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        # In fp16, small probabilities would become zero before the loss scale is applied: its products are in fp32.
        kept = wide if x_ND.dtype == torch.float16 else x_ND.dtype
        losses_N = torch.empty(len(x_ND), dtype=wide, device=x_ND.device)
        dx_ND = torch.empty_like(x_ND, dtype=kept) if needs_x else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        for start in range(0, len(x_ND), chunk):
            here = slice(start, start + chunk)
            x_nD, slope_nV = x_ND[here], None
            logits_nV, needs_slope = mm(x_nD, weight_VD.t()), needs_x or needs_weight
            losses_N[here], slope_nV = _losses_and_slope(logits_nV, targets_N[here], needs_slope, overwrites=True)
            if slope_nV is not None and dx_ND is not None:
                mm(slope_nV, weight_VD.to(kept), out=dx_ND[here])
            if slope_nV is not None and dweight_VD is not None:
                dweight_VD += mm(slope_nV.t(), x_nD.to(kept))
        ctx.save_for_backward(dx_ND, dweight_VD)
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = []
        for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if each is not None:
                # In fp32, and rounded once: 1/N rounded to 16 bits would be wrong by the same factor everywhere.
                wide, each = each.to(gradient.dtype), torch.empty_like(each, dtype=dtype)
                torch.mul(wide, gradient, out=each)
            found.append(each)
        return *found, None, None


def _losses_and_slope(
    logits_NV: Tensor, targets_N: Tensor, needs_slope: bool, overwrites: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute the losses, fp32 or wider, and softmax - one-hot: the gradient of a loss with respect to its logits.

    `overwrites`: the logits are not needed afterwards; where one kernel computes all, the slope takes their memory.
    """
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    # The slope is in [-1, 1]. bf16 loses no more than the gradient of the logits loses anyway. In fp16, small
    # probabilities would become zero before the loss scale is applied.
    kept = torch.float32 if logits_NV.dtype == torch.float16 else logits_NV.dtype
    kernels = token_kernels_for(logits_NV)
    if kernels is not None and overwrites and needs_slope and kept == logits_NV.dtype:
        return kernels.cross_entropy(logits_NV, targets_N, IGNORED_TARGET, logits_NV), logits_NV
    slope_NV = torch.empty_like(logits_NV, dtype=kept) if needs_slope else None
    if kernels is not None:
        return kernels.cross_entropy(logits_NV, targets_N, IGNORED_TARGET, slope_NV), slope_NV
    losses_N = torch.empty(logits_NV.shape[0], dtype=wide, device=logits_NV.device)
    rows = _chunk_rows(logits_NV, wide)
    for start in range(0, logits_NV.shape[0], rows):
        here = slice(start, start + rows)
        is_counted_n1 = (targets_N[here] != IGNORED_TARGET).unsqueeze(1)
        targets_n1 = targets_N[here].clamp(min=0).unsqueeze(1)
        logits_nV = logits_NV[here].to(wide, copy=True)
        chosen_n1 = logits_nV.gather(1, targets_n1)
        largest_n1 = logits_nV.amax(1, keepdim=True)
        exponentials_nV = logits_nV.sub_(largest_n1).exp_()
        total_n1 = exponentials_nV.sum(1, keepdim=True)
        losses_N[here] = ((total_n1.log() + largest_n1 - chosen_n1) * is_counted_n1).squeeze(1)
        if slope_NV is not None:
            weight_n1 = is_counted_n1.to(wide)
            slope_nV = exponentials_nV.mul_(weight_n1 / total_n1).scatter_add_(1, targets_n1, -weight_n1)
            slope_NV[here] = slope_nV.to(kept)
    return losses_N, slope_NV


def _chunk_rows(x_NV: Tensor, wide: torch.dtype) -> int:
    return max(1, CHUNK_BYTES[x_NV.device.type] // (x_NV.shape[1] * wide.itemsize))


def token_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Compute the cross-entropy of every token, logsumexp(logits) - logits[target], in nats.

    Args:
        logits_NV: Logits of any floating dtype; the computation uses at least fp32.
        targets_N: int64 targets; IGNORED_TARGET gives loss 0.

    Returns:
        [N], fp32 or wider.
    """
    return _TokenCrossEntropy.apply(logits_NV, targets_N)


def mean_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Compute the mean of `token_cross_entropy` over all targets except IGNORED_TARGET.

    Args:
        logits_NV: Logits of any floating dtype.
        targets_N: int64 targets.

    Returns:
        Scalar in nats per token, fp32 or wider; 0 if no target counts.
    """
    num_counted = (targets_N != IGNORED_TARGET).sum().clamp(min=1)
    return token_cross_entropy(logits_NV, targets_N).sum() / num_counted


def loss_chunk(num_tokens: int, vocab_size: int, hidden_size: int, element_bytes: int, wanted: int | None) -> int:
    """Choose how many tokens' logits exist at a time.

    Args:
        num_tokens: N, tokens of a forward pass.
        vocab_size: V.
        hidden_size: D.
        element_bytes: Bytes per element of the model.
        wanted: Number of tokens; None: all, unless all logits take much memory, and more than chunks take.

    Returns:
        Number of tokens of a chunk; num_tokens: the logits are not cut.
    """
    if wanted is not None:
        return min(wanted, num_tokens)
    row = vocab_size * element_bytes
    # Chunks take a sum of the weight's gradient in fp32; without them there are the logits and their gradient.
    saved = 2 * row * num_tokens - 2 * _LOGITS_BYTES - 4 * vocab_size * hidden_size
    if row * num_tokens <= 2 * _LOGITS_BYTES or saved <= 0:
        return num_tokens
    return min(num_tokens, max(_LEAST_CHUNK, _LOGITS_BYTES // row // _LEAST_CHUNK * _LEAST_CHUNK))


def summed_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of the logits x weight^T, of which only a chunk of the tokens exists at a time.

    Gradients are formed in the forward pass, so that no product is computed twice: that of the weight is a sum over the
    chunks in at least fp32.

    Args:
        x_ND: Hidden states.
        weight_VD: Weight of the head.
        targets_N: int64 targets; IGNORED_TARGET gives loss 0.
        chunk: Tokens whose logits exist at a time.

    Returns:
        The sum over all tokens, a scalar in nats; and the losses [N] without a gradient. fp32 or wider.
    """
    return _SummedCrossEntropy.apply(x_ND, weight_VD, targets_N, chunk)
