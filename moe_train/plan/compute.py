"""Compute time of one rank in one micro-batch, by term: products, attention, elementwise work, operations.

Reads and writes of elementwise work are counted from the operations of moe_train/model and moe_train/ops, in bytes per
element. Numbers of operations were counted on one block of each kind (torch 2.13).
Legend: T tokens, D hidden_size, H query heads, G key/value heads, d head size, F inner width, E experts, x experts per
rank, K top_k, R rows at the experts of a rank, V vocabulary; e bytes per element.
"""

from dataclasses import dataclass

from moe_train.config.registry import load_part
from moe_train.config.run import RecomputedPart
from moe_train.model.cost import Attention, FeedForwardCost, MixerCost, RouterCost
from moe_train.plan.layout import Layout
from moe_train.plan.loads import RowLoads
from moe_train.plan.rates import Rates
from moe_train.plan.shapes import LayerShape, ModelShape

_WIDE = 4
_ATTENTION_BACKWARD = 2.5  # times the forward pass: five products instead of two
_ROUTER_BYTES = 8  # of an element that a router reads and writes
# Operations, forward and backward: of a mixer and of a feed-forward layer, each with its norm, in addition of an MoE
# layer, of an expert on a CPU, of dispatch, and of a chunk.
_MIXER, _FEED_FORWARD = (55, 83), (20, 47)
_MOE, _EXPERT, _DISPATCH, _CHUNK = (110, 90), (9, 13), (90, 40), (40, 30)
_AROUND = (80, 60)  # embedding, head, loss and balance terms
_LOSS_PASSES = (
    6,
    3,
)  # passes over [T, V] in fp32 that do not fit a cache, forward and backward; on CUDA one kernel each
_CPU_KEY_BLOCK = 512  # keys per block of torch's attention on CPU
_SOFTMAX_PASSES = 4  # passes over the scores in fp32
_NORM = {"cpu": (28, 50), "cuda": (8, 16)}  # bytes per element in fp32, forward and backward; on CUDA in any dtype


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
        mixer: Time of norms, projections and attention, or whatever mixes the sequence.
        feed_forward: Time of the dense feed-forward layer or the shared experts.
        router: Time of the router of an MoE layer, and of the local work of dispatch.
        experts: Time of the experts of an MoE layer, for the mean rows of a rank.
        mixer_operations: Fixed time of the operations of norm and mixer.
        feed_forward_operations: Fixed time of the operations of norm and feed-forward layer.
    """

    mixer: Pass
    feed_forward: Pass
    router: Pass
    experts: Pass
    mixer_operations: Pass
    feed_forward_operations: Pass

    def forward(self, part: RecomputedPart) -> tuple[float, float]:
        """Return the seconds of a part's forward pass, and the fixed time of its operations in them."""
        mixer = (self.mixer.forward, self.mixer_operations.forward)
        others = self.feed_forward.forward + self.router.forward + self.experts.forward
        experts = (others, self.feed_forward_operations.forward)
        block = (mixer[0] + experts[0], mixer[1] + experts[1])
        return {"none": (0.0, 0.0), "attention": mixer, "experts": experts, "block": block}[part]


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
    mixer = _mixer(layer.mixer, layout, rates) + norms + residual
    mixer_operations, operations = _operations(rates, _MIXER), _operations(rates, _FEED_FORWARD)
    if layer.feed_forward is not None:
        feed_forward = _stated(layer.feed_forward, layout, rates) + norms + residual
        return BlockWork(mixer, feed_forward, NOTHING, NOTHING, mixer_operations, operations)
    moe, inner = config.moe, config.expert_intermediate_size
    cost: RouterCost = load_part("routers", moe.router).cost
    router = _linear(rates, tokens, hidden, moe.num_experts, "fp32") * cost.products + norms + residual
    router += _elementwise(rates, tokens * hidden * cost.products, (e + _WIDE, e + _WIDE) if e < _WIDE else (0, 0))
    router += _elementwise(rates, tokens * moe.num_experts * _ROUTER_BYTES, (cost.forward, cost.backward))
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
    return BlockWork(mixer, shared, router, experts, mixer_operations, operations)


def head_work(shape: ModelShape, layout: Layout, rates: Rates) -> Pass:
    """Compute the time of embedding, final norm, head and loss.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
        rates: Speed of the machine.
    """
    e, tokens, hidden = layout.dtype_bytes, layout.predictions, shape.config.hidden_size
    work = _linear(rates, tokens, hidden, shape.vocab_size) + _elementwise(rates, tokens * hidden, _norm(rates, e))
    forward, backward = _LOSS_PASSES
    wide = (2 * e + _WIDE * forward, 2 * e + _WIDE * backward)
    if rates.machine.device == "cuda":
        wide = (4 * e, 2 * e)  # the head's write, two reads and the slope; the slope and its product
    work += _elementwise(rates, tokens * shape.vocab_size, wide)
    # The gradient of the embedding is dense, as large as the embedding.
    work += Pass(rates.moving(2 * e * tokens * hidden), rates.moving(e * hidden * (2 * tokens + shape.vocab_size)))
    return work


def around_operations(rates: Rates) -> Pass:
    """Compute the fixed time of the operations outside the blocks."""
    return _operations(rates, _AROUND)


def _stated(cost: MixerCost | FeedForwardCost, layout: Layout, rates: Rates) -> Pass:
    """Compute the time of the products and of the elementwise work that a part states."""
    tokens, e, work = layout.tokens, layout.dtype_bytes, NOTHING
    for product in cost.products:
        work += _linear(rates, tokens, product.width_in, product.width_out) * product.count
    casts = 2 * (e + _WIDE) if e < _WIDE else 0
    for each in cost.elementwise:
        bytes_of_one = (each.forward + casts, each.backward + casts)
        if each.is_narrow:
            bytes_of_one = (each.forward * e // _WIDE, each.backward * e // _WIDE)
        work += _elementwise(rates, tokens * each.numbers, bytes_of_one)
    return work


def _mixer(cost: MixerCost, layout: Layout, rates: Rates) -> Pass:
    tokens, e = layout.tokens, layout.dtype_bytes
    work = _stated(cost, layout, rates)
    if cost.normed:
        work += _elementwise(rates, tokens * cost.normed, _norm(rates, e))
    if cost.attention is None:
        return work
    return work + attention_work(cost.attention, layout, rates)


def attention_work(attention: Attention, layout: Layout, rates: Rates) -> Pass:
    """Compute the time of the scores of attention and of what is read by them, without the projections.

    Args:
        attention: Attention of a layer.
        layout: Layout of the run; ranks that share sequences have equal parts of the visible pairs.
        rates: Speed of the machine.
    """
    length, window = layout.sequence_length, attention.window or layout.sequence_length
    heads = layout.micro_batch * attention.num_heads / layout.context_size
    scores = heads * layout.copies * _scores(length, window, attention.head_dim, rates)
    if layout.copies > 1:
        hidden, keys = length * (layout.copies - 1), attention.hidden_keys
        scores += heads * _masked_scores(hidden, keys, attention.head_dim, rates)
    return Pass(scores, _ATTENTION_BACKWARD * scores)


def _scores(length: int, window: int, size: int, rates: Rates) -> float:
    """Compute the seconds of one head's attention over one sequence, forward."""
    window = min(window, length)
    seen = (window * (window + 1) / 2 + (length - window) * window) / length
    if not rates.is_cpu:
        return rates.fused(4.0 * length * size * seen, (length, size, seen), 4 * length * size)
    # A block of keys is skipped only where no query of a block sees any of its keys. Softmax takes additional time.
    return _masked_scores(length, min(length, seen + _CPU_KEY_BLOCK / 2), size, rates)


def _masked_scores(queries: float, keys: float, size: int, rates: Rates) -> float:
    """Compute the seconds of one head's attention of queries over some keys each, masked ones included, forward."""
    softmax = rates.elementwise(_SOFTMAX_PASSES * _WIDE * queries * keys)
    return rates.product(queries, size, keys) + rates.product(queries, keys, size) + softmax


def _linear(rates: Rates, rows: float, width_in: float, width_out: float, precision: str | None = None) -> Pass:
    forward = rates.product(rows, width_in, width_out, precision)  # type: ignore[arg-type]
    return Pass(forward, rates.gradients(rows, width_in, width_out, precision))  # type: ignore[arg-type]


def _swiglu(rates: Rates, tokens: float, hidden: int, inner: int, e: int) -> Pass:
    products = _linear(rates, tokens, hidden, 2 * inner) + _linear(rates, tokens, inner, hidden)
    return products + _elementwise(rates, tokens * inner, (5 * e, 13 * e))


def _norm(rates: Rates, e: int) -> tuple[float, float]:
    forward, backward = _NORM[rates.machine.device]
    if rates.machine.device == "cuda":
        return forward * e / _WIDE, backward * e / _WIDE
    casts = 2 * (e + _WIDE) if e < _WIDE else 0
    return forward + casts, backward + casts


def _elementwise(rates: Rates, elements: float, bytes_of_one: tuple[float, float]) -> Pass:
    return Pass(rates.elementwise(elements * bytes_of_one[0]), rates.elementwise(elements * bytes_of_one[1]))


def _operations(rates: Rates, number: tuple[int, int]) -> Pass:
    return Pass(rates.operations(number[0]), rates.operations(number[1]))
