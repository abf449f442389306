"""Memory of one rank by part, at the moment of a step at which it is most.

"Most" is what torch.cuda.max_memory_allocated counts: bytes of tensors at one time, whether or not all of a buffer has
been touched. Four moments can be the one: the loss (all blocks' activations and the logits), the backward pass of a
block (activations of the blocks below, gradients of those above), the reduction of gradients, the optimizer's update.
"""

from dataclasses import dataclass

from moe_train.model.decode_state import kv_cache_bytes
from moe_train.plan.activations import BlockMemory, HeadMemory, block_memory, head_memory
from moe_train.plan.layout import Layout
from moe_train.plan.loads import RowLoads
from moe_train.plan.shapes import LayerShape, ModelShape
from moe_train.plan.states import ModelStates, model_states

PARTS = (
    "weights",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "all_to_all",
    "zero_buffers",
    "kv_cache",
    "framework",
)
_FP32 = 4
_NORM_BYTES = 8  # gradients are cast to fp64 for their norm, one tensor at a time
_CUDA_FRAMEWORK = int(1.5 * 2**30)  # CUDA context, NCCL's buffers and the kernels' workspaces
_CUDA_FRAGMENTATION = 0.03  # of what is allocated, kept by the allocator and of no use
_UPDATE, _LOSS, _REDUCE = "update", "loss", "reduce"


@dataclass(frozen=True)
class Decoding:
    """Sequences that are decoded together.

    Attributes:
        batch_size: How many.
        length: Tokens of one.
    """

    batch_size: int
    length: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        parts: By the names of PARTS, when their sum is largest.
        moment: When that is: loss, backward of a block, reduce or update.
        states: Of weights and optimizer states.
    """

    parts: dict[str, float]
    moment: str
    states: ModelStates

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def plan_memory(
    shape: ModelShape, layout: Layout, loads: RowLoads, device: str, decoding: Decoding | None = None
) -> Memory:
    """The memory of the rank with most.

    Args:
        shape: The model.
        layout: Of the run.
        loads: Rows of a rank's experts.
        device: cpu or cuda.
        decoding: Whose keys and values are kept beside training; None: none.
    """
    states = model_states(shape, layout)
    steady = {"weights": float(states.weights), "optimizer_states": float(states.optimizer_states)}
    if decoding is not None:
        steady["kv_cache"] = float(_kv_cache(shape, layout, decoding))
    known: dict[LayerShape, BlockMemory] = {}
    for layer in shape.layers:
        if layer not in known:
            known[layer] = block_memory(shape, layer, layout, loads, device)
    blocks, head = [known[layer] for layer in shape.layers], head_memory(shape, layout, device)
    moments = [*_passes(blocks, head, shape, states, layout), _reduce(states, layout), _update(states, layout)]
    name, most = max(moments, key=lambda moment: sum(moment[1].values()))
    parts = {part: steady.get(part, 0.0) + most.get(part, 0.0) for part in PARTS}
    if device == "cuda":
        parts["framework"] = _CUDA_FRAMEWORK + _CUDA_FRAGMENTATION * sum(parts.values())
    return Memory(parts, name, states)


def _kv_cache(shape: ModelShape, layout: Layout, decoding: Decoding) -> int:
    config = shape.config
    return kv_cache_bytes(
        batch_size=decoding.batch_size,
        length=decoding.length,
        num_owner_layers=len(config.kv_owner_layers),
        num_kv_heads=config.attention_kv_heads,
        head_dim=config.attention_head_dim,
        bytes_per_element=layout.dtype_bytes,
        window=config.sliding_window,
    )


def _passes(
    blocks: list[BlockMemory], head: HeadMemory, shape: ModelShape, states: ModelStates, layout: Layout
) -> list[tuple[str, dict[str, float]]]:
    """The loss, and the backward pass of every block."""
    kept = [block.input if layout.recomputes else block.saved for block in blocks]
    held = _gradients_before(states, layout)
    live = {"weights": float(states.gathered)}
    below = sum(kept)
    loss = {"activations": below + head.saved, "logits": head.logits + head.forward_work, **live}
    # A block's forward pass needs its own memory too where nothing of it stays; it is that of its backward pass.
    found = [(_LOSS, _sum(loss, held))]
    bucket = _bucket(states, layout)
    elements = shape.outside - (0 if shape.config.tie_embeddings else shape.vocab_size * shape.config.hidden_size)
    # Of the head's: the gradient of the logits goes into the product that gives that of its weight.
    parts = {"activations": below + head.saved, "logits": head.logits + head.backward_work, **live}
    found.append((_LOSS, _sum(parts, held, bucket, _gradients_made(elements, states, layout))))
    for number, block in reversed(list(enumerate(blocks))):
        elements += block.elements
        again = block.saved if layout.recomputes else 0.0
        parts = {"activations": below + again + block.work, "all_to_all": block.buffers, **live}
        made = _gradients_made(elements, states, layout)
        found.append((f"backward of block {number}", _sum(parts, held, bucket, made)))
        below -= kept[number]
    return found


def _gradients_before(states: ModelStates, layout: Layout) -> dict[str, float]:
    """What is there in the last forward pass of a step."""
    if layout.zero_stage == 3:
        held = {"gradients": float(layout.gradient_bytes * states.partition_elements)}
        return held | {"zero_buffers": float(layout.bucket_elements * layout.dtype_bytes)}
    if layout.accumulation == 1:
        return {}
    if layout.zero_stage == 2:
        return {"gradients": float(_FP32 * states.partition_elements)}
    return {"gradients": float(_FP32 * states.local_elements), **_bucket(states, layout)}


def _bucket(states: ModelStates, layout: Layout) -> dict[str, float]:
    """ZeRO's bucket in a backward pass, where it is not there before."""
    if layout.zero_stage == 3:
        return {}
    # Stage 1 gathers fp32 sums where passes are added up.
    size = layout.gradient_bytes if layout.zero_stage == 1 else layout.dtype_bytes
    return {"zero_buffers": float(size * layout.bucket_elements)}


def _gradients_made(elements: int, states: ModelStates, layout: Layout) -> dict[str, float]:
    """Gradients of so many elements, the last ones of the model."""
    e, bucket = layout.dtype_bytes, layout.bucket_elements
    if layout.zero_stage == 1:
        # Added up in fp32 where passes are: those were there before.
        return {"gradients": float(e * elements)} if layout.accumulation == 1 else {}
    flushed = elements > bucket
    # A full bucket is copied for its reduction, and the rank's own part of it afterwards.
    copies = {"zero_buffers": float(e * min(bucket, elements))} if flushed else {}
    if layout.zero_stage == 3 or layout.accumulation > 1 or not flushed:
        return copies
    return {"gradients": float(e * states.partition_elements), **copies}


def _reduce(states: ModelStates, layout: Layout) -> tuple[str, dict[str, float]]:
    """The end of the backward pass: what is in the bucket is copied, reduced and copied to the rank's part."""
    e, local = layout.dtype_bytes, states.local_elements
    filled = min(layout.bucket_elements, local)
    of_one_group = max(sum(g.numel for g in states.groups if g.is_expert is kind) for kind in (True, False))
    copied = min(filled, of_one_group)
    if layout.zero_stage == 3:
        held = _gradients_before(states, layout)
        return _REDUCE, _sum(held, {"zero_buffers": float(e * copied)})
    bucket = _bucket(states, layout)
    size = layout.gradient_bytes if layout.zero_stage == 1 else e
    own = _FP32 if layout.accumulation > 1 and e < _FP32 else e
    parts = {"gradients": float(own * states.partition_elements), "zero_buffers": float(size * copied)}
    if layout.zero_stage == 1:
        parts["gradients"] += size * (local - filled)
    return _REDUCE, _sum(parts, bucket)


def _update(states: ModelStates, layout: Layout) -> tuple[str, dict[str, float]]:
    """The optimizer: one group's gradients after the other's are made one fp32 tensor."""
    e, size = layout.dtype_bytes, layout.gradient_bytes
    largest = max(group.partition for group in states.groups)
    narrow = size < _FP32
    if layout.zero_stage == 3 or not (layout.accumulation > 1 and e < _FP32):
        flat = (size + (_FP32 if narrow else 0)) * largest
    else:
        flat = 0  # they are one fp32 tensor already
    norm = _NORM_BYTES * max(min(group.largest, group.partition) for group in states.groups)
    held = {"gradients": float(size * states.partition_elements)}
    if layout.zero_stage == 3:
        held = _gradients_before(states, layout)
    return _UPDATE, _sum(held, {"zero_buffers": float(max(flat, norm))})


def _sum(*parts: dict[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in parts:
        for name, held in each.items():
            total[name] = total.get(name, 0.0) + held
    return total
