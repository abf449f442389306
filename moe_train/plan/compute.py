"""Compute time of one rank in one micro-batch, by term: products, attention, elementwise work, operations.

Reads and writes of elementwise work are counted from the operations of moe_train/model and moe_train/ops, in bytes per
element. Numbers of operations were counted on one block of each kind (torch 2.13).
Legend: T tokens, D hidden_size, H query heads, G key/value heads, d head size, F inner width, E experts, x experts per
rank, K top_k, R rows at the experts of a rank, V vocabulary; e bytes per element.
"""

from dataclasses import dataclass

from moe_train.plan.layout import Layout
from moe_train.plan.loads import RowLoads
from moe_train.plan.rates import Rates
from moe_train.plan.shapes import LayerShape, ModelShape

_WIDE = 4
_ATTENTION_BACKWARD = 2.5  # times the forward pass: five products instead of two
# Passes over [T, E] of 8 bytes, forward and backward, for logits, hashed draws, choice of experts and sums.
_ROUTER_PASSES = {"noisy_topk": (120, 40), "softmax_topk": (50, 20), "sigmoid_topk": (50, 20), "switch": (50, 20)}
# Operations, forward and backward: of a block, in addition of an MoE layer, of an expert on a CPU, of dispatch, and of
# a chunk.
_BLOCK, _MOE, _EXPERT, _DISPATCH, _CHUNK = (75, 130), (110, 90), (9, 13), (90, 40), (40, 30)
_AROUND = (80, 60)  # embedding, head, loss and balance terms
_LOSS_PASSES = (6, 3)  # passes over [T, V] in fp32 that do not fit a cache, forward and backward
_CPU_KEY_BLOCK = 512  # keys per block of torch's attention on CPU
_SOFTMAX_PASSES = 4  # passes over the scores in fp32
_NORM = {"cpu": (28, 50), "cuda": (8, 16)}  # bytes per element in fp32, forward and backward
_ROTARY = (36, 40)


@dataclass(frozen=True)
class Pass:
    """Time of one micro-batch.

    Attributes:
        forward: Seconds of the forward pass.
        backward: Seconds of the backward pass.
    """

    forward: float
    backward: float

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> "Pass":
        return Pass(self.forward * factor, self.backward * factor)


NOTHING = Pass(0.0, 0.0)


@dataclass(frozen=True)
class BlockWork:
    """Time of one block in one micro-batch, by term.

    Attributes:
        attention: Time of norms, projections and attention.
        feed_forward: Time of the dense feed-forward layer or the shared experts.
        router: Time of the router of an MoE layer, and of the local work of dispatch.
        experts: Time of the experts of an MoE layer, for the mean rows of a rank.
        operations: Fixed time of all operations.
    """

    attention: Pass
    feed_forward: Pass
    router: Pass
    experts: Pass
    operations: Pass


def block_work(shape: ModelShape, layer: LayerShape, layout: Layout, loads: RowLoads, rates: Rates) -> BlockWork:
    """Compute the time of one block.

    Args:
        shape: Sizes of the model.
        layer: Sizes of the block.
        layout: Layout of the run.
        loads: Rows at the experts of a rank.
        rates: Speed of the machine.
    """
    config, e, tokens = shape.config, layout.dtype_bytes, layout.tokens
    hidden = config.hidden_size
    norms = _elementwise(rates, tokens * hidden, _norm(rates, e))
    residual = _elementwise(rates, tokens * hidden, (3 * e, 3 * e))
    attention = _attention(shape, layer, layout, rates) + norms + residual
    operations = _operations(rates, _BLOCK)
    if not layer.is_moe:
        feed_forward = _swiglu(rates, tokens, hidden, config.intermediate_size, e) + norms + residual
        return BlockWork(attention, feed_forward, NOTHING, NOTHING, operations)
    moe, inner = config.moe, config.expert_intermediate_size
    maps = 2 if moe.router == "noisy_topk" else 1
    router = _linear(rates, tokens, hidden, moe.num_experts, "fp32") * maps + norms + residual
    router += _elementwise(rates, tokens * hidden * maps, (e + _WIDE, e + _WIDE) if e < _WIDE else (0, 0))
    router += _elementwise(rates, tokens * moe.num_experts * 8, _ROUTER_PASSES[moe.router])
    operations += _operations(rates, _MOE)
    if layout.ep_size > 1:
        # Rows are gathered before sending, and summed after their return; the backward pass does both too.
        row = e * hidden * (loads.sent + loads.mean_rows) + 2 * e * hidden * tokens
        router += Pass(rates.moving(row), rates.moving(row))
        operations += _operations(rates, _DISPATCH) + _operations(rates, _CHUNK) * layout.chunks
    here = moe.num_experts // layout.ep_size
    each = loads.mean_rows / here / layout.chunks
    products = (_linear(rates, each, hidden, 2 * inner) + _linear(rates, each, inner, hidden)) * (here * layout.chunks)
    rows = loads.mean_rows
    experts = products + _elementwise(rates, rows * inner, (7 * e, 20 * e))
    experts += _elementwise(rates, rows * hidden, (4 * e, 6 * e))
    if layout.chunks > 1:  # the weight gradients of all chunks are summed
        weights = 3 * e * here * 3 * hidden * inner * (layout.chunks - 1)
        experts += Pass(0.0, rates.moving(weights))
    if rates.is_cpu:
        operations += _operations(rates, _EXPERT) * (here * layout.chunks)
    shared = NOTHING
    if moe.num_shared_experts:
        shared = _swiglu(rates, tokens, hidden, moe.num_shared_experts * inner, e)
    return BlockWork(attention, shared, router, experts, operations)


def head_work(shape: ModelShape, layout: Layout, rates: Rates) -> Pass:
    """Compute the time of embedding, final norm, head and loss.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
        rates: Speed of the machine.
    """
    e, tokens, hidden = layout.dtype_bytes, layout.tokens, shape.config.hidden_size
    work = _linear(rates, tokens, hidden, shape.vocab_size) + _elementwise(rates, tokens * hidden, _norm(rates, e))
    forward, backward = _LOSS_PASSES
    wide = (2 * e + _WIDE * forward, 2 * e + _WIDE * backward)
    work += _elementwise(rates, tokens * shape.vocab_size, wide)
    # The gradient of the embedding is dense, as large as the embedding.
    work += Pass(rates.moving(2 * e * tokens * hidden), rates.moving(e * hidden * (2 * tokens + shape.vocab_size)))
    return work


def around_operations(rates: Rates) -> Pass:
    """Compute the fixed time of the operations outside the blocks."""
    return _operations(rates, _AROUND)


def _attention(shape: ModelShape, layer: LayerShape, layout: Layout, rates: Rates) -> Pass:
    config, tokens, length = shape.config, layout.tokens, layout.sequence_length
    size = config.attention_head_dim
    queries, keys = config.num_heads * size, config.attention_kv_heads * size
    work = _linear(rates, tokens, config.hidden_size, queries) + _linear(rates, tokens, queries, config.hidden_size)
    turned = queries + (keys if layer.owns_key_value else 0)
    if layer.owns_key_value:
        work += _linear(rates, tokens, config.hidden_size, keys) * 2
    e = layout.dtype_bytes
    casts = 2 * (e + _WIDE) if e < _WIDE else 0
    work += _elementwise(rates, tokens * turned, (_ROTARY[0] + casts, _ROTARY[1] + casts))
    if config.qk_norm != "none":
        work += _elementwise(rates, tokens * turned, _norm(rates, e))
    scores = layout.micro_batch * config.num_heads * _scores(length, config.sliding_window or length, size, rates)
    return work + Pass(scores, _ATTENTION_BACKWARD * scores)


def _scores(length: int, window: int, size: int, rates: Rates) -> float:
    """Compute the seconds of one head's attention over one sequence, forward."""
    window = min(window, length)
    seen = (window * (window + 1) / 2 + (length - window) * window) / length
    if not rates.is_cpu:
        return rates.fused(4.0 * length * size * seen, (length, size, seen), 4 * length * size)
    # A block of keys is skipped only where no query of a block sees any of its keys. Softmax takes additional time.
    seen = min(length, seen + _CPU_KEY_BLOCK / 2)
    softmax = rates.elementwise(_SOFTMAX_PASSES * _WIDE * length * seen)
    return rates.product(length, size, seen) + rates.product(length, seen, size) + softmax


def _linear(rates: Rates, rows: float, width_in: float, width_out: float, precision: str | None = None) -> Pass:
    forward = rates.product(rows, width_in, width_out, precision)  # type: ignore[arg-type]
    return Pass(forward, rates.gradients(rows, width_in, width_out, precision))  # type: ignore[arg-type]


def _swiglu(rates: Rates, tokens: float, hidden: int, inner: int, e: int) -> Pass:
    products = _linear(rates, tokens, hidden, 2 * inner) + _linear(rates, tokens, inner, hidden)
    return products + _elementwise(rates, tokens * inner, (5 * e, 13 * e))


def _norm(rates: Rates, e: int) -> tuple[float, float]:
    casts = 2 * (e + _WIDE) if e < _WIDE else 0
    forward, backward = _NORM[rates.machine.device]
    return forward + casts, backward + casts


def _elementwise(rates: Rates, elements: float, bytes_of_one: tuple[float, float]) -> Pass:
    return Pass(rates.elementwise(elements * bytes_of_one[0]), rates.elementwise(elements * bytes_of_one[1]))


def _operations(rates: Rates, number: tuple[int, int]) -> Pass:
    return Pass(rates.operations(number[0]), rates.operations(number[1]))
