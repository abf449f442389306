"""Triton kernels for the scan of TTT with a linear inner model: one launch forward and three backward.

A program of the scan has one head of one row. It goes through the mini-batches and holds the head's weights on chip.
moe_train.ops.ttt says what is computed, and does the same in PyTorch; moe_train.ops.kernels decides where they run.

Backward, the first launch computes the weights again and writes those of every mini-batch. The second one computes,
for all mini-batches side by side, what needs no later mini-batch. The third one goes from the last mini-batch to the
first and adds what learning gives. So nothing but the inputs is kept between forward and backward.

Products are in full fp32: what is rounded in one mini-batch goes into all later ones. There are no atomic additions.

Legend: B batch, H heads, n mini-batches, b tokens of a mini-batch, f head size; f1 = f + 1, the last row is the bias.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_HEAD_SIZE = 64  # beyond, registers and shared memory do not hold the weights and their gradient
MAX_MINI_BATCH = 16  # beyond, the backward pass needs more shared memory than the 99 KiB of compute capability 8.6
_LEAST_BLOCK = 16  # Triton's products have no smaller sides


class LinearScan(torch.autograd.Function):
    """Outputs q_i + LN(f_{W_i}(q_i)) of all tokens, [B, n, H, b, f], where every row begins with a document.

    Args of `apply`, fp32 but for the marks:
        q_BnHbf: Queries.
        k_BnHbf: Keys.
        target_BnHbf: Values less keys.
        rates_BnHb: Learning rate of each token; 0 for empty columns.
        rows_Bnb: Factor of each token's own output.
        start_Hf1f: Weights with which a document begins.
        weight_Hf: Weight of the norm.
        bias_Hf: Bias of the norm.
        last_row: Factor of the last token of a full mini-batch, a scalar.
        begins_Bn: bool, whether the mini-batch begins a document.
        is_full_Bn: bool, whether the mini-batch has its last token.
        epsilon: Number beside the biased variance in the norm.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, epsilon = inputs
        tensors = [tensor.contiguous() for tensor in tensors]
        ctx.save_for_backward(*tensors)
        ctx.epsilon = epsilon
        out_BnHbf = torch.empty_like(tensors[0])
        _launch(_forward_kernel, tensors, (out_BnHbf, None), epsilon)
        return out_BnHbf

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BnHbf: Tensor) -> tuple[Tensor | None, ...]:
        tensors, epsilon = ctx.saved_tensors, ctx.epsilon
        q, _, _, rates, _, start, weight, bias, last_row, *_ = tensors
        batch, num_batches, heads, _, width = q.shape
        states = q.new_empty(batch, heads, num_batches, *start.shape[1:])
        _launch(_forward_kernel, tensors, (None, states), epsilon)
        grad_q, grad_k, grad_target, grad_z, grad_slope = (torch.empty_like(q) for _ in range(5))
        grad_rates, grad_rows = torch.empty_like(rates), torch.empty_like(rates)
        # What programs share is a part of each, then summed: the order of a sum is fixed.
        of_batch = [q.new_empty(batch * num_batches, heads, width) for _ in range(2)]
        outputs = (grad_q, grad_k, grad_rates, grad_rows, grad_z, grad_slope, *of_batch)
        inputs = (states, slope_BnHbf.contiguous())
        _launch(_output_gradients_kernel, tensors, (*inputs, *outputs), epsilon, batch * num_batches * heads)
        grad_start, *of_row = (q.new_empty(batch, *like.shape) for like in (start, weight, bias))
        grad_last = q.new_empty(batch, heads)
        outputs = (grad_z, grad_slope, grad_k, grad_rates, grad_target, grad_start, *of_row, grad_last)
        _launch(_learning_gradients_kernel, tensors, (states, *outputs), epsilon)
        norms = [one.sum(0) + other.sum(0) for one, other in zip(of_batch, of_row, strict=True)]
        shared = (grad_rows.sum(2), grad_start.sum(0), *norms, grad_last.sum().view_as(last_row))
        return grad_q, grad_k, grad_target, grad_rates, *shared, None, None, None


def _launch(
    kernel: Any, tensors: Any, others: tuple[Tensor | None, ...], epsilon: float, programs: int | None = None
) -> None:
    """Launch a kernel on the inputs of `LinearScan` and its further tensors; by default, a program has a row's head."""
    batch, num_batches, heads, size, width = tensors[0].shape
    blocks = {"BLOCK_B": _block(size), "BLOCK_F": _block(width)}
    numbers = {"SIZE": size, "WIDTH": width, **blocks, "num_warps": max(4, blocks["BLOCK_F"] // 8)}
    if tensors[0].numel():
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            kernel[(programs or batch * heads,)](*tensors, *others, num_batches, heads, epsilon, **numbers)


def _block(size: int) -> int:
    return max(triton.next_power_of_2(size), _LEAST_BLOCK)


# Kernels. Columns and rows beyond f and b are zeros: whatever is a mean over columns is cut to those that are there.
# The numbers of mini-batches differ from step to step: not to be compiled for each.


@triton.jit
def _dot(one, other):
    return tl.dot(one, other, input_precision="ieee")


@triton.jit
def _normalise(z, has_column, width, epsilon):
    centred = tl.where(has_column, z - (tl.sum(z, 1) / width)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + epsilon)
    return centred * scale[:, None], scale


@triton.jit
def _across(x, hat, has_column, width):
    """Take from each row what is along ones and along the normalised row: a norm does not change with it."""
    mean, along = tl.sum(x, 1) / width, tl.sum(x * hat, 1) / width
    return tl.where(has_column, x - mean[:, None] - hat * along[:, None], 0.0)


@triton.jit
def _matrix(at, columns, WIDTH: tl.constexpr):
    """Load a matrix [f, f] and the bias behind it."""
    inside = (columns[:, None] < WIDTH) & (columns[None, :] < WIDTH)
    weights = tl.load(at + columns[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    return weights, tl.load(at + WIDTH * WIDTH + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def _store_matrix(at, weights, bias, columns, WIDTH: tl.constexpr):
    inside = (columns[:, None] < WIDTH) & (columns[None, :] < WIDTH)
    tl.store(at + columns[:, None] * WIDTH + columns[None, :], weights, mask=inside)
    tl.store(at + WIDTH * WIDTH + columns, bias, mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_batches"])
def _forward_kernel(
    queries, keys, targets, rates, rows, start, norm_weight, norm_bias, last_row, begins, is_full, out, states,
    num_batches, num_heads, epsilon,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // num_heads, program % num_heads
    slots, columns = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_F)
    has_column = columns[None, :] < WIDTH
    inside = (slots[:, None] < SIZE) & has_column
    gamma = tl.load(norm_weight + head * WIDTH + columns, mask=columns < WIDTH, other=0.0)[None, :]
    beta = tl.load(norm_bias + head * WIDTH + columns, mask=columns < WIDTH, other=0.0)[None, :]
    learned = start + head * (WIDTH + 1) * WIDTH
    weights, bias = _matrix(learned, columns, WIDTH)
    factor = tl.load(last_row)
    for number in range(num_batches):
        if tl.load(begins + row * num_batches + number):
            weights, bias = _matrix(learned, columns, WIDTH)
        if states is not None:
            at = states + (program * num_batches + number) * (WIDTH + 1) * WIDTH
            _store_matrix(at, weights, bias, columns, WIDTH)
        first = ((row * num_batches + number) * num_heads + head) * SIZE
        at = first * WIDTH + slots[:, None] * WIDTH + columns[None, :]
        k = tl.load(keys + at, mask=inside, other=0.0)
        target = tl.load(targets + at, mask=inside, other=0.0)
        rate = tl.load(rates + first + slots, mask=slots < SIZE, other=0.0)
        hat, scale = _normalise(_dot(k, weights) + bias[None, :], has_column, WIDTH, epsilon)
        slope = _across((gamma * hat + beta - target) * gamma, hat, has_column, WIDTH) * scale[:, None]
        if out is not None:
            q = tl.load(queries + at, mask=inside, other=0.0)
            own = tl.load(rows + (row * num_batches + number) * SIZE + slots, mask=slots < SIZE, other=0.0)
            steps = tl.where(slots[:, None] >= slots[None, :], own[:, None] * rate[None, :], 0.0)
            z = _dot(q, weights) + bias[None, :] - _dot(steps * (_dot(q, tl.trans(k)) + 1.0), slope)
            hat, scale = _normalise(z, has_column, WIDTH, epsilon)
            tl.store(out + at, q + gamma * hat + beta, mask=inside)
        if tl.load(is_full + row * num_batches + number):
            slope *= rate[:, None]
            weights -= factor * _dot(tl.trans(k), slope)
            bias -= factor * tl.sum(slope, 0)


@triton.jit(do_not_specialize=["num_batches"])
def _output_gradients_kernel(
    queries, keys, targets, rates, rows, start, norm_weight, norm_bias, last_row, begins, is_full, states, slopes,
    grad_q, grad_k, grad_rates, grad_rows, grad_z, grad_slope, grad_weight, grad_bias,
    num_batches, num_heads, epsilon,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // num_heads, program % num_heads
    row, number = batch // num_batches, batch % num_batches
    slots, columns = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_F)
    has_column = columns[None, :] < WIDTH
    inside = (slots[:, None] < SIZE) & has_column
    is_earlier = slots[:, None] >= slots[None, :]
    gamma = tl.load(norm_weight + head * WIDTH + columns, mask=columns < WIDTH, other=0.0)[None, :]
    beta = tl.load(norm_bias + head * WIDTH + columns, mask=columns < WIDTH, other=0.0)[None, :]
    at = states + ((row * num_heads + head) * num_batches + number) * (WIDTH + 1) * WIDTH
    weights, bias = _matrix(at, columns, WIDTH)
    first = program * SIZE
    at = first * WIDTH + slots[:, None] * WIDTH + columns[None, :]
    q = tl.load(queries + at, mask=inside, other=0.0)
    k = tl.load(keys + at, mask=inside, other=0.0)
    target = tl.load(targets + at, mask=inside, other=0.0)
    rate = tl.load(rates + first + slots, mask=slots < SIZE, other=0.0)
    own = tl.load(rows + batch * SIZE + slots, mask=slots < SIZE, other=0.0)
    # The forward pass again.
    hat, scale = _normalise(_dot(k, weights) + bias[None, :], has_column, WIDTH, epsilon)
    slope = _across((gamma * hat + beta - target) * gamma, hat, has_column, WIDTH) * scale[:, None]
    scores = tl.where(is_earlier, _dot(q, tl.trans(k)) + 1.0, 0.0)
    steps = own[:, None] * rate[None, :]
    z = _dot(q, weights) + bias[None, :] - _dot(steps * scores, slope)
    hat, scale = _normalise(z, has_column, WIDTH, epsilon)
    # The output: q + gamma * hat + beta.
    d_out = tl.load(slopes + at, mask=inside, other=0.0)
    tl.store(grad_weight + program * WIDTH + columns, tl.sum(d_out * hat, 0), mask=columns < WIDTH)
    tl.store(grad_bias + program * WIDTH + columns, tl.sum(d_out, 0), mask=columns < WIDTH)
    d_z = _across(gamma * d_out, hat, has_column, WIDTH) * scale[:, None]
    # z = q W + bias - (steps * scores) slope.
    d_product = -_dot(d_z, tl.trans(slope))
    d_steps = d_product * scores
    d_scores = tl.where(is_earlier, d_product * steps, 0.0)
    tl.store(grad_z + at, d_z, mask=inside)
    tl.store(grad_slope + at, -_dot(tl.trans(steps * scores), d_z), mask=inside)
    tl.store(grad_q + at, d_out + _dot(d_z, tl.trans(weights)) + _dot(d_scores, k), mask=inside)
    tl.store(grad_k + at, _dot(tl.trans(d_scores), q), mask=inside)
    tl.store(grad_rates + first + slots, tl.sum(d_steps * own[:, None], 0), mask=slots < SIZE)
    tl.store(grad_rows + first + slots, tl.sum(d_steps * rate[None, :], 1), mask=slots < SIZE)


@triton.jit(do_not_specialize=["num_batches"])
def _learning_gradients_kernel(
    queries, keys, targets, rates, rows, start, norm_weight, norm_bias, last_row, begins, is_full, states,
    grad_z, grad_slope, grad_k, grad_rates, grad_target, grad_start, grad_weight, grad_bias, grad_last,
    num_batches, num_heads, epsilon,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // num_heads, program % num_heads
    slots, columns = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_F)
    has_column = columns[None, :] < WIDTH
    inside = (slots[:, None] < SIZE) & has_column
    gamma = tl.load(norm_weight + head * WIDTH + columns, mask=columns < WIDTH, other=0.0)[None, :]
    beta = tl.load(norm_bias + head * WIDTH + columns, mask=columns < WIDTH, other=0.0)[None, :]
    factor = tl.load(last_row)
    # Gradients of the weights behind the mini-batch, and of those that a document begins with.
    d_weights, d_start = tl.zeros((BLOCK_F, BLOCK_F), tl.float32), tl.zeros((BLOCK_F, BLOCK_F), tl.float32)
    d_bias, d_start_bias = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    d_gamma, d_beta = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    d_last = 0.0
    for step in range(num_batches):
        number = num_batches - 1 - step
        weights, bias = _matrix(states + (program * num_batches + number) * (WIDTH + 1) * WIDTH, columns, WIDTH)
        first = ((row * num_batches + number) * num_heads + head) * SIZE
        at = first * WIDTH + slots[:, None] * WIDTH + columns[None, :]
        k = tl.load(keys + at, mask=inside, other=0.0)
        rate = tl.load(rates + first + slots, mask=slots < SIZE, other=0.0)
        hat, scale = _normalise(_dot(k, weights) + bias[None, :], has_column, WIDTH, epsilon)
        error = gamma * hat + beta - tl.load(targets + at, mask=inside, other=0.0)
        pull = error * gamma
        slope = _across(pull, hat, has_column, WIDTH) * scale[:, None]
        # The weights behind the mini-batch: W - learned * k1^T (rate * slope), where k1 ends with a one.
        is_learned = tl.load(is_full + row * num_batches + number).to(tl.float32)
        learned = is_learned * factor * rate
        pulled = _dot(k, d_weights) + d_bias[None, :]
        along = tl.sum(slope * pulled, 1)
        d_last -= is_learned * tl.sum(rate * along, 0)
        d_rate = tl.load(grad_rates + first + slots, mask=slots < SIZE, other=0.0) - is_learned * factor * along
        tl.store(grad_rates + first + slots, d_rate, mask=slots < SIZE)
        # slope = across(pull) * scale, pull = (gamma * hat + beta - target) * gamma.
        d_slope = tl.load(grad_slope + at, mask=inside, other=0.0) - learned[:, None] * pulled
        d_across = d_slope * scale[:, None]
        d_pull = _across(d_across, hat, has_column, WIDTH)
        tl.store(grad_target + at, -gamma * d_pull, mask=inside)
        d_gamma += tl.sum(d_pull * (error + gamma * hat), 0)
        d_beta += tl.sum(d_pull * gamma, 0)
        along_pull, along_across = tl.sum(pull * hat, 1) / WIDTH, tl.sum(d_across * hat, 1) / WIDTH
        d_hat = gamma * gamma * d_pull - d_across * along_pull[:, None] - pull * along_across[:, None]
        # hat = centred * scale, and slope has the scale as a factor too.
        d_inner = d_hat - hat * (tl.sum(d_slope * slope + d_hat * hat, 1) / WIDTH)[:, None]
        d_inner = tl.where(has_column, d_inner - (tl.sum(d_inner, 1) / WIDTH)[:, None], 0.0) * scale[:, None]
        d_k = tl.load(grad_k + at, mask=inside, other=0.0) - learned[:, None] * _dot(slope, tl.trans(d_weights))
        tl.store(grad_k + at, d_k + _dot(d_inner, tl.trans(weights)), mask=inside)
        q = tl.load(queries + at, mask=inside, other=0.0)
        d_z = tl.load(grad_z + at, mask=inside, other=0.0)
        d_bias += tl.sum(d_z, 0) + tl.sum(d_inner, 0)
        d_weights += _dot(tl.trans(q), d_z) + _dot(tl.trans(k), d_inner)
        if (tl.load(begins + row * num_batches + number) != 0) | (number == 0):
            d_start += d_weights
            d_start_bias += d_bias
            d_weights = tl.zeros((BLOCK_F, BLOCK_F), tl.float32)
            d_bias = tl.zeros((BLOCK_F,), tl.float32)
    _store_matrix(grad_start + program * (WIDTH + 1) * WIDTH, d_start, d_start_bias, columns, WIDTH)
    tl.store(grad_weight + program * WIDTH + columns, d_gamma, mask=columns < WIDTH)
    tl.store(grad_bias + program * WIDTH + columns, d_beta, mask=columns < WIDTH)
    tl.store(grad_last + program, d_last)
