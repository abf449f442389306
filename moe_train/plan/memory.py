"""Peak memory of one rank by part, at the moment of a step that needs most.

The peak is what torch.cuda.max_memory_allocated counts: bytes of tensors that exist at the same time, also where parts
of a buffer have not been used. Four moments can be the peak: the loss (activations of all blocks, and the logits), the
backward pass of a block (activations of the blocks below, gradients of the blocks above), the reduction of gradients,
and the update of the optimizer. What offloading moves to the host's memory does not change during a step. A device that
is a CPU has the same memory as its host, so that the peak counts both.
"""

from dataclasses import dataclass

from moe_train.config.run import RecomputedPart
from moe_train.model.build import feed_forward_of, mixer_of
from moe_train.plan.activations import BlockMemory, HeadMemory, block_memory, head_memory
from moe_train.plan.host import host_parts, largest_tensor
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
_NORM_BYTES = 8  # bytes per element: gradients are cast to fp64 for their norm, one tensor at a time
_CUDA_FRAMEWORK = int(3.5 * 2**30)  # bytes of the CUDA context, NCCL buffers and workspaces of kernels
_CUDA_FRAGMENTATION = 0.03  # share of the allocated bytes that the allocator holds in addition, unused
_UPDATE, _LOSS, _REDUCE = "update", "loss", "reduce"


@dataclass(frozen=True)
class Decoding:
    """Sequences that are decoded together, for the size of their KV cache.

    Attributes:
        batch_size: Number of sequences.
        length: Tokens per sequence.
    """

    batch_size: int
    length: int


@dataclass(frozen=True)
class Memory:
    """Peak memory of one rank.

    Attributes:
        parts: Bytes by name of PARTS, at the moment when their sum is largest.
        moment: Name of this moment: loss, backward of a block, reduce or update.
        states: Weights and optimizer states.
        host: Bytes of the host's memory by name of HOST_PARTS, where it is not that of the device.
    """

    parts: dict[str, float]
    moment: str
    states: ModelStates
    host: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts of the device."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> float:
        """Bytes of the host's memory that this rank takes."""
        return sum(self.host.values())


def plan_memory(
    shape: ModelShape, layout: Layout, loads: RowLoads, device: str, decoding: Decoding | None = None
) -> Memory:
    """Compute the peak memory of the rank that needs most.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
        loads: Rows at the experts of a rank.
        device: Device type, cpu or cuda.
        decoding: Sequences whose keys and values are kept beside training; None: no KV cache.
    """
    states = model_states(shape, layout)
    host = host_parts(states, layout, device)
    steady = {"weights": float(states.weights)}
    if not layout.offloads:
        steady["optimizer_states"] = float(states.optimizer_states)
    elif layout.zero_stage < 3:
        steady["zero_buffers"] = float(layout.dtype_bytes * largest_tensor(states))
    if device == "cpu":  # the same memory
        steady, host = _sum(steady, {part: held for part, held in host.items() if held}), {}
    if decoding is not None:
        steady["kv_cache"] = float(_kv_cache(shape, layout, decoding))
    known: dict[tuple[LayerShape, RecomputedPart], BlockMemory] = {}
    keys = [(layer, layout.recompute.in_layer(number)) for number, layer in enumerate(shape.layers)]
    for layer, part in keys:
        if (layer, part) not in known:
            known[layer, part] = block_memory(shape, layer, layout, loads, device, part)
    blocks, head = [known[key] for key in keys], head_memory(shape, layout, device)
    moments = [*_passes(blocks, head, shape, states, layout), _reduce(states, layout), _update(states, layout)]
    name, most = max(moments, key=lambda moment: sum(moment[1].values()))
    parts = {part: steady.get(part, 0.0) + most.get(part, 0.0) for part in PARTS}
    if device == "cuda":
        parts["framework"] = _CUDA_FRAMEWORK + _CUDA_FRAGMENTATION * sum(parts.values())
    return Memory(parts, name, states, host)


def _kv_cache(shape: ModelShape, layout: Layout, decoding: Decoding) -> int:
    mixers = (mixer_of(shape.config, layer) for layer in range(shape.config.num_layers))
    of_a_sequence = sum(kind.state_bytes(spec, decoding.length, layout.dtype_bytes) for kind, spec in mixers)
    dense = (feed_forward_of(shape.config, number) for number, layer in enumerate(shape.layers) if not layer.is_moe)
    of_a_sequence += sum(kind.state_bytes(spec, layout.dtype_bytes) for kind, spec in dense)
    return decoding.batch_size * of_a_sequence


def _passes(
    blocks: list[BlockMemory], head: HeadMemory, shape: ModelShape, states: ModelStates, layout: Layout
) -> list[tuple[str, dict[str, float]]]:
    """List the moments of a pass with their bytes: the loss, and the backward pass of every block."""
    held = _gradients_before(states, layout)
    live = {"weights": float(states.gathered)}
    below = sum(block.kept for block in blocks)
    loss = {"activations": below + head.saved, "logits": head.logits + head.forward_work, **live}
    # With recomputation, the forward pass of a block also needs temporary memory: as much as its backward pass, which
    # is counted below.
    found = [(_LOSS, _sum(loss, held))]
    bucket = _bucket(states, layout)
    elements = shape.outside - (0 if shape.config.tie_embeddings else shape.vocab_size * shape.config.hidden_size)
    # Backward pass of the head: the gradient of its weight is a product with the gradient of the logits.
    parts = {"activations": below + head.saved, "logits": head.logits + head.backward_work, **live}
    found.append((_LOSS, _sum(parts, held, bucket, _gradients_made(elements, states, layout))))
    for number, block in reversed(list(enumerate(blocks))):
        elements += block.elements
        below -= block.kept
        made = _gradients_made(elements, states, layout)
        for activations, buffers in block.in_backward:
            parts = {"activations": below + activations, "all_to_all": buffers, **live}
            found.append((f"backward of block {number}", _sum(parts, held, bucket, made)))
    return found


def _gradients_before(states: ModelStates, layout: Layout) -> dict[str, float]:
    """Compute the bytes of gradients and buffers that exist in the last forward pass of a step."""
    if layout.zero_stage == 3:
        held = {"gradients": float(_own_gradients(layout) * states.partition_elements)}
        return held | {"zero_buffers": float(layout.bucket_elements * layout.dtype_bytes)}
    if layout.accumulation == 1:
        return {}
    if layout.zero_stage == 2:
        return {"gradients": float(_own_gradients(layout) * states.partition_elements)}
    return {"gradients": float(_FP32 * states.local_elements), **_bucket(states, layout)}


def _own_gradients(layout: Layout) -> int:
    """Compute the bytes per element of this rank's averaged gradients that are on the device after a backward pass."""
    if not layout.offloads:
        return layout.gradient_bytes
    # Stages 1 and 2 add up on the device where the sums are wider than the weights.
    is_wider = layout.gradient_bytes > layout.dtype_bytes
    return layout.gradient_bytes if is_wider and layout.zero_stage < 3 else 0


def _norm_bytes(states: ModelStates) -> int:
    """Compute the bytes of the largest gradient in the type of its norm."""
    return _NORM_BYTES * max(min(group.largest, group.partition) for group in states.groups)


def _bucket(states: ModelStates, layout: Layout) -> dict[str, float]:
    """Compute the bytes of ZeRO's bucket in a backward pass, where it did not exist before."""
    if layout.zero_stage == 3:
        return {}
    # Stage 1 fills the bucket with fp32 sums where several passes are accumulated.
    size = layout.gradient_bytes if layout.zero_stage == 1 else layout.dtype_bytes
    return {"zero_buffers": float(size * layout.bucket_elements)}


def _gradients_made(elements: int, states: ModelStates, layout: Layout) -> dict[str, float]:
    """Compute the bytes of the gradients of the model's last elements, as many as given."""
    e, bucket = layout.dtype_bytes, layout.bucket_elements
    if layout.zero_stage == 1:
        # Where several passes are accumulated, the fp32 sums already exist.
        return {"gradients": float(e * elements)} if layout.accumulation == 1 else {}
    flushed = elements > bucket
    # A full bucket is copied for its reduction, and then this rank's part of it is copied.
    copies = {"zero_buffers": float(e * min(bucket, elements))} if flushed else {}
    if layout.zero_stage == 3 or layout.accumulation > 1 or not flushed:
        return copies
    return {"gradients": float(_own_gradients(layout) * states.partition_elements), **copies}


def _reduce(states: ModelStates, layout: Layout) -> tuple[str, dict[str, float]]:
    """Compute the bytes at the end of the backward pass: the bucket is copied, reduced, and copied to partitions."""
    e, local = layout.dtype_bytes, states.local_elements
    filled = min(layout.bucket_elements, local)
    of_one_group = max(sum(g.numel for g in states.groups if g.is_expert is kind) for kind in (True, False))
    copied = min(filled, of_one_group)
    norm = _norm_bytes(states) if layout.offloads else 0  # which is formed before a gradient goes to the host
    if layout.zero_stage == 3:
        held = _gradients_before(states, layout)
        return _REDUCE, _sum(held, {"zero_buffers": float(e * copied + norm)})
    bucket = _bucket(states, layout)
    size = layout.gradient_bytes if layout.zero_stage == 1 else e
    own = _own_gradients(layout) * states.partition_elements
    parts = {"gradients": float(own), "zero_buffers": float(max(size * copied, norm))}
    if layout.zero_stage == 1:
        parts["gradients"] += size * (local - filled)
    return _REDUCE, _sum(parts, bucket)


def _update(states: ModelStates, layout: Layout) -> tuple[str, dict[str, float]]:
    """Compute the bytes of the optimizer's update, which flattens the gradients of one group at a time to fp32."""
    e, size = layout.dtype_bytes, layout.gradient_bytes
    held = {"gradients": float(_own_gradients(layout) * states.partition_elements)}
    if layout.zero_stage == 3:
        held = _gradients_before(states, layout)
    if layout.offloads:
        return _UPDATE, held
    largest = max(group.partition for group in states.groups)
    narrow = size < _FP32
    if layout.zero_stage == 3 or not (layout.accumulation > 1 and e < _FP32):
        flat = (size + (_FP32 if narrow else 0)) * largest
    else:
        flat = 0  # they are already one fp32 tensor
    matrices = [group for group in states.groups if group.is_matrix]
    # Momentum and gradient of a group, and a bucket of whole matrices with its updates.
    whole = max((g.partition + 2 * min(g.numel, layout.optimizer_kind.bucket_elements) for g in matrices), default=0)
    return _UPDATE, _sum(held, {"zero_buffers": float(max(flat, _norm_bytes(states)) + _FP32 * whole)})


def _sum(*parts: dict[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in parts:
        for name, held in each.items():
            total[name] = total.get(name, 0.0) + held
    return total
