"""Activation memory, block by block: bytes kept for the backward pass, and bytes needed temporarily.

The bytes are counted from the operations of moe_train/model and moe_train/ops. A tensor that autograd keeps counts
once.
Legend: T tokens per rank, B sequences, D hidden_size, H query heads, G key/value heads, d head size, F inner width,
R rows at the experts of a rank, K top_k, E experts, V vocabulary, C chunks; e bytes per element.
"""

from dataclasses import dataclass

from moe_train.config.registry import load_part
from moe_train.config.run import RecomputedPart
from moe_train.model.cost import RouterCost
from moe_train.ops.cross_entropy import CHUNK_BYTES, loss_chunk
from moe_train.ops.routed_mlp import BLOCK_ROWS, NUM_BLOCKS
from moe_train.plan.layout import Layout
from moe_train.plan.loads import RowLoads
from moe_train.plan.shapes import LayerShape, ModelShape

_WIDE = 4  # bytes of fp32
_INDEX = 8  # bytes of int64
_INDICES_OF_AN_ASSIGNMENT = 6  # orders, places and sources of rows that are kept for the backward pass
_CHUNK_TENSORS = 2  # tensors of a chunk of the cross-entropy at once


@dataclass(frozen=True)
class PartMemory:
    """Activation memory of a part of a block on one rank: its mixer or its feed-forward layer, with the norm.

    Attributes:
        saved: Bytes kept from its forward pass to its backward pass.
        input: Bytes kept instead where it is recomputed: its input, and what it hands up.
        work: Bytes needed temporarily in its backward pass, without the gradients of its weights.
        buffers: Bytes of all-to-all buffers, needed temporarily in its backward pass.
    """

    saved: float
    input: float
    work: float
    buffers: float = 0.0


@dataclass(frozen=True)
class BlockMemory:
    """Activation memory of one block on one rank.

    Attributes:
        mixer: That of its mixer.
        feed_forward: That of its feed-forward layer.
        recomputed: Part that the backward pass computes again.
        elements: Number of elements of its weights on this rank.
    """

    mixer: PartMemory
    feed_forward: PartMemory
    recomputed: RecomputedPart
    elements: int

    @property
    def kept(self) -> float:
        """Bytes kept from its forward pass to its backward pass."""
        mixer, feed_forward = self.mixer, self.feed_forward
        return {
            "none": mixer.saved + feed_forward.saved,
            "attention": mixer.input + feed_forward.saved,
            "experts": mixer.saved + feed_forward.input,
            "block": mixer.input,
        }[self.recomputed]

    @property
    def in_backward(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Bytes of activations and of all-to-all buffers in the backward pass of each part, the later part first."""
        mixer, feed_forward = self.mixer, self.feed_forward
        again = {"experts": feed_forward.saved, "block": mixer.saved + feed_forward.saved}.get(self.recomputed, 0.0)
        first = self.kept + again + feed_forward.work
        # What the feed-forward layer kept is gone.
        held = mixer.saved + (mixer.input if self.recomputed in ("attention", "block") else 0.0)
        return (first, feed_forward.buffers), (held + mixer.work, mixer.buffers)


@dataclass(frozen=True)
class HeadMemory:
    """Activation memory outside the blocks: final norm, head and loss.

    Attributes:
        saved: Bytes kept, without the gradient of the logits.
        logits: Bytes of the gradient of the logits, which the forward pass computes; of that of the head's weight, if
            the logits are computed in chunks.
        forward_work: Bytes of the logits and of fp32 copies of their chunks.
        backward_work: Bytes of the gradient that enters the head.
    """

    saved: float
    logits: float
    forward_work: float
    backward_work: float


def payload_bytes(layout: Layout, hidden_size: int) -> int:
    """Compute the bytes of one row that travels between ranks.

    Args:
        layout: Layout of the run; its payload gives the number format.
        hidden_size: D, elements per row.
    """
    sizes = {"model": layout.dtype_bytes * hidden_size, "bf16": 2 * hidden_size, "fp8": hidden_size + 4}
    return sizes[layout.payload]


def block_memory(
    shape: ModelShape, layer: LayerShape, layout: Layout, loads: RowLoads, device: str, recomputed: RecomputedPart
) -> BlockMemory:
    """Compute the activation memory of one block.

    Args:
        shape: Sizes of the model.
        layer: Sizes of the block.
        layout: Layout of the run.
        loads: Rows at the experts of a rank.
        device: Device type, cpu or cuda.
        recomputed: Part that the backward pass computes again.
    """
    config, e, tokens = shape.config, layout.dtype_bytes, layout.tokens
    mixer = layer.mixer
    norm = _norm_bytes(e, device) * tokens * config.hidden_size
    kept = norm + e * tokens * mixer.kept + _WIDE * tokens * mixer.kept_fp32
    kept += _norm_bytes(e, device) * tokens * mixer.normed
    work = _WIDE * tokens * (3 * config.hidden_size + mixer.work)
    if layout.context_exchange == "gather_once" and mixer.owns_exchanged:  # keys and values of all ranks
        kept += e * tokens * (layout.context_size - 1) * mixer.exchanged
    ranks = layout.context_size if layout.context_exchange == "gather_once" else 1
    stream = e * tokens * config.hidden_size
    held = stream + e * tokens * ranks * mixer.handed_up
    if layer.feed_forward is not None:
        dense = layer.feed_forward
        own = float(tokens * (e * dense.kept + _WIDE * dense.kept_fp32))
        extra, buffers = float(e * tokens * dense.work), 0.0
    else:
        own, extra, buffers = _moe_memory(shape, layout, loads, device, recomputed in ("experts", "block"))
    return BlockMemory(
        PartMemory(kept, held, work + _exchange_work(mixer.exchanged, layout)),
        PartMemory(norm + own, stream, extra, buffers),
        recomputed,
        layer.dense + layer.experts // layout.ep_size,
    )


def _exchange_work(exchanged: int, layout: Layout) -> float:
    """Compute the bytes that attention needs beside for keys and values of other ranks, in its backward pass."""
    size, e = layout.context_size, layout.dtype_bytes
    if size == 1:
        return 0.0
    # This rank's own together, what has been gathered or is held and arriving, and their gradients: those of all ranks
    # and what arrives from all, or the share of one step and what arrives.
    held, shares = (2, 3) if layout.context_exchange == "ring" else (size, 2 * size)
    return float(layout.tokens * exchanged * (e * (1 + held) + _WIDE * shares))


def _moe_memory(
    shape: ModelShape, layout: Layout, loads: RowLoads, device: str, is_recomputed: bool
) -> tuple[float, float, float]:
    config, e, tokens = shape.config, layout.dtype_bytes, layout.tokens
    # Kept memory is summed over blocks. Recomputed and temporary memory belongs to one block at a time.
    kept = loads.busiest_rows if is_recomputed else loads.most_rows
    hidden, inner, moe = config.hidden_size, config.expert_intermediate_size, config.moe
    assignments = tokens * moe.top_k
    saved = float(e * tokens * hidden)  # the normed input, which the experts use directly where they are on one rank
    router: RouterCost = load_part("routers", moe.router).cost
    if e < _WIDE or moe.input_jitter:
        saved += router.products * _WIDE * tokens * hidden  # the input of the router in fp32
    saved += router.kept * _WIDE * tokens * moe.num_experts
    saved += _INDICES_OF_AN_ASSIGNMENT * _INDEX * assignments + e * 2 * inner * kept  # and the first product
    buffers = 0.0
    if layout.ep_size > 1:
        saved += e * hidden * (loads.busiest_arriving if is_recomputed else loads.most_arriving)
        # Rows sent and rows received, two chunks at a time; in the model's dtype too if the payload is another.
        row = payload_bytes(layout, hidden) + (0 if layout.payload == "model" else e * hidden)
        buffers = min(1.0, 2 / layout.chunks) * row * (loads.sent + loads.busiest_arriving)
    if moe.num_shared_experts:
        saved += e * tokens * 3 * moe.num_shared_experts * inner
    rows = loads.busiest_rows
    # The gradient of the rows, then for a block of rows (on CUDA for all rows) the gradients of the activation and its
    # input, and the slope.
    at_once = rows if device == "cuda" else min(rows, max(BLOCK_ROWS, rows / NUM_BLOCKS))
    work = e * hidden * (rows + 2 * tokens) + e * at_once * (4 * inner + 2 * hidden)
    return saved, work, buffers


def head_memory(shape: ModelShape, layout: Layout, device: str) -> HeadMemory:
    """Compute the activation memory outside the blocks.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
        device: Device type, cpu or cuda.
    """
    e, tokens, hidden = layout.dtype_bytes, layout.predictions, shape.config.hidden_size
    norm = _norm_bytes(e, device) if shape.config.norm_position == "pre" else 0
    logits = float(tokens * shape.vocab_size)
    slope = _WIDE if layout.precision == "fp16" else e
    at_once = loss_chunk(tokens, shape.vocab_size, hidden, e, layout.loss_chunk_tokens)
    if at_once < tokens:
        logits = float(at_once * shape.vocab_size)
    chunk = min(_CHUNK_TENSORS * CHUNK_BYTES[device], _CHUNK_TENSORS * _WIDE * logits)
    if at_once < tokens:
        # The gradients of the head's input and weight are formed in the forward pass, the latter in fp32.
        weight = shape.vocab_size * hidden
        return HeadMemory(
            saved=tokens * hidden * (norm + e + slope),
            logits=_WIDE * weight,
            forward_work=(e + slope) * logits + chunk + slope * weight,
            backward_work=e * tokens * hidden,
        )
    return HeadMemory(
        saved=tokens * hidden * (norm + e),
        logits=slope * logits,
        forward_work=e * logits + chunk,
        backward_work=e * logits + e * tokens * hidden,
    )


def _norm_bytes(e: int, device: str) -> int:
    """Compute the bytes per element that a norm keeps: its input, on a CPU in fp32 and with the normed input."""
    return e if device == "cuda" else 2 * _WIDE
