"""Triton kernels for what every token passes beside matrix products: rotation, cross-entropy, the choice of experts.

moe_train.ops.kernels decides where they run; rotary, cross_entropy and the routers compute the same in PyTorch.
Arithmetic is fp32, and each result is rounded once. Each replaces a chain of operations that would read and write all
elements many times (rotation, cross-entropy), or launch many small kernels (choice).
Legend: B batch, H heads, S sequence, d head size, N tokens, V vocab_size, T tokens, E experts, K top_k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_ROTATED = 2048  # elements of half a head, over several heads, that a program rotates
_VOCABULARY_BLOCK, _VOCABULARY_WARPS = 4096, 8
MOST_EXPERTS = 1024  # a program holds the scores of a token in registers
_LOWEST = tl.constexpr(-3.0e38)  # below every logit; not -inf, whose difference to itself is NaN
_TAKEN = tl.constexpr(-(1 << 63))  # below the rank of every expert
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)


def rotate(x_BHSd: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotate the pairs of both halves of each head by the angles of the positions.

    Args:
        x_BHSd: Queries or keys, fp32, bf16 or fp16, in any order of memory.
        cos: fp32 [B or 1, 1, S, d/2].
        sin: fp32 [B or 1, 1, S, d/2].
        sign: 1 to rotate; -1 to rotate back, as the gradient needs.

    Returns:
        [B, H, S, d] in the dtype of x, in its order of memory.
    """
    x_BHSd = x_BHSd if x_BHSd.stride(3) == 1 else x_BHSd.contiguous()
    batch, heads, length, size = x_BHSd.shape
    cos, sin, out_BHSd = cos.contiguous(), sin.contiguous(), torch.empty_like(x_BHSd)
    if out_BHSd.numel():
        half = triton.next_power_of_2(size // 2)
        block = min(triton.next_power_of_2(heads), max(_MOST_ROTATED // half, 1))
        strides = *x_BHSd.stride()[:3], *out_BHSd.stride()[:3]
        with torch.cuda.device_of(x_BHSd):  # Triton launches on the current device
            _rotate_kernel[(batch * length, triton.cdiv(heads, block))](
                *(
                    x_BHSd,
                    cos,
                    sin,
                    out_BHSd,
                    heads,
                    length,
                    size // 2,
                    *strides,
                    length * (size // 2) * (len(cos) > 1),
                ),
                sign,
                HEADS=block,
                HALF=half,
                num_warps=4,
            )
    return out_BHSd


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, ignored: int, slope_NV: Tensor | None) -> Tensor:
    """Compute the losses of all tokens, and softmax - one-hot; two reads of the logits and one write.

    Args:
        logits_NV: fp32, bf16 or fp16.
        targets_N: int64 targets.
        ignored: Target that has loss 0 and slope 0.
        slope_NV: Receives softmax - one-hot; may be the logits themselves. None: it is not wanted.

    Returns:
        fp32 [N].
    """
    losses_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    if logits_NV.numel():
        slope = logits_NV if slope_NV is None else slope_NV
        assert logits_NV.stride(1) == slope.stride(1) == 1, "rows are contiguous"
        block = min(triton.next_power_of_2(logits_NV.shape[1]), _VOCABULARY_BLOCK)
        with torch.cuda.device_of(logits_NV):
            _cross_entropy_kernel[(len(logits_NV),)](
                *(logits_NV, targets_N.contiguous(), losses_N, slope, logits_NV.shape[1]),
                *(logits_NV.stride(0), slope.stride(0), ignored),
                HAS_SLOPE=slope_NV is not None,
                BLOCK=block,
                num_warps=_VOCABULARY_WARPS,
            )
    return losses_N


def choose(scores_TE: Tensor, token_keys_T: Tensor, tie_key: int, top_k: int) -> Tensor:
    """Choose the K best experts of every token, best first; a keyed draw orders equal scores.

    Args:
        scores_TE: fp32; E at most MOST_EXPERTS.
        token_keys_T: int64 random key of each token.
        tie_key: 64-bit key of the draws.
        top_k: K, experts per token.

    Returns:
        int64 [T, K].
    """
    num_tokens, num_experts = scores_TE.shape
    chosen_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=scores_TE.device)
    if chosen_TK.numel():
        block = triton.next_power_of_2(num_experts)
        with torch.cuda.device_of(scores_TE):
            _choose_kernel[(num_tokens,)](
                *(scores_TE.contiguous(), token_keys_T.contiguous(), chosen_TK, tie_key, num_experts),
                TOP_K=top_k,
                BLOCK=block,
                num_warps=max(1, block // 256),
            )
    return chosen_TK


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    num_heads,
    length,
    half,
    x_batch,
    x_head,
    x_place,
    out_batch,
    out_head,
    out_place,
    angle_batch,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, place = token // length, token % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    angle = row * angle_batch + place * half + column
    cosine = tl.load(cos + angle, mask=column < half, other=0.0)
    sine = tl.load(sin + angle, mask=column < half, other=0.0) * sign
    mask = (head < num_heads) & (column < half)
    at = x + row * x_batch + place * x_place + head * x_head + column
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    to = out + row * out_batch + place * out_place + head * out_head + column
    tl.store(to, (first * cosine - second * sine).to(out.dtype.element_ty), mask=mask)
    tl.store(to + half, (second * cosine + first * sine).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, slopes, width, stride, slope_stride, ignored, HAS_SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    is_counted = target != ignored
    largest = tl.full((BLOCK,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * stride + column, mask=column < width, other=_LOWEST).to(tl.float32)
        larger = tl.maximum(largest, logit)
        total = total * tl.exp(largest - larger) + tl.exp(logit - larger)
        largest = larger
    highest = tl.max(largest, 0)
    sum_of_all = tl.sum(total * tl.exp(largest - highest), 0)
    chosen = tl.load(logits + row * stride + tl.where(is_counted, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(is_counted, tl.log(sum_of_all) + highest - chosen, 0.0))
    if HAS_SLOPE:
        weight = tl.where(is_counted, 1.0, 0.0)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            logit = tl.load(logits + row * stride + column, mask=column < width, other=_LOWEST).to(tl.float32)
            slope = tl.exp(logit - highest) * (weight / sum_of_all) - tl.where(column == target, weight, 0.0)
            tl.store(slopes + row * slope_stride + column, slope.to(slopes.dtype.element_ty), mask=column < width)


@triton.jit
def _mixed(bits):
    bits = (bits ^ (bits >> 30)) * _FIRST_FACTOR
    bits = (bits ^ (bits >> 27)) * _SECOND_FACTOR
    return bits ^ (bits >> 31)


@triton.jit(do_not_specialize=["tie_key"])
def _choose_kernel(scores, token_keys, chosen, tie_key, num_experts, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    # As ops.keyed_random.combine, in unsigned integers: their shifts are logical.
    key = tl.load(token_keys + token).to(tl.uint64, bitcast=True)
    key = _mixed(key + tl.cast(tie_key, tl.int64).to(tl.uint64, bitcast=True) * _GOLDEN)
    draw = _mixed(key + expert.to(tl.uint64) * _GOLDEN)
    score = tl.load(scores + token * num_experts + expert, mask=expert < num_experts, other=0.0) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # negative numbers count backwards
    rank = (ordered << 32) + (0x7FFFFFFF - (draw.to(tl.int64, bitcast=True) >> 32))
    rank = tl.where(expert < num_experts, rank, _TAKEN)
    for place in tl.static_range(TOP_K):
        best = tl.max(rank, 0)
        number = tl.max(tl.where(rank == best, expert, -1), 0)
        tl.store(chosen + token * TOP_K + place, number.to(tl.int64))
        rank = tl.where(expert == number, _TAKEN, rank)
