"""Infini-attention: causal attention within segments, and a compressive memory of the document's segments before.

A head's output is sigmoid(beta) * memory + (1 - sigmoid(beta)) * attention. Gradients flow through the memory over all
segments.

Source: Munkhdalai et al. 2024, arXiv 2404.07143. Ours: with grouped heads there is one memory per key/value head.
Legend: B batch, S sequence, D hidden_size, H query heads, G key/value heads, d head size, N segment length, n segments,
w query columns of a segment, C key columns of a segment.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from moe_train.config.base import Section
from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.distributed.context import ContextRanks
from moe_train.model.cost import Attention, Elementwise, MixerCost, Product
from moe_train.model.decode_state import CacheSpec, RecurrentState, Tensors
from moe_train.model.layers import Linear
from moe_train.model.mixers.base import Mixer, MixerContext, MixerKind, MixerSpec, Shared
from moe_train.model.mixers.chunks import join_chunks, memory_before, split_chunks
from moe_train.model.parameters import Constant, InitialValue, OptimRule
from moe_train.ops.aligned_blocks import AlignedBlocks, align
from moe_train.ops.attention import attend
from moe_train.ops.compressive_memory import (
    Memory,
    SegmentWrites,
    read,
    write_by_delta_rule,
    write_by_linear_rule,
)
from moe_train.ops.rotary import apply_rotary


class InfiniConfig(Section):
    """Settings of Infini-attention."""

    segment_length: PositiveInt = 128
    """Tokens of a segment. train.sequence_length must be larger, or the memory is never read."""
    memory: Literal["linear", "delta"] = "linear"
    """Rule by which a segment is written to the memory. linear: its values are added; delta: only what the memory does
    not return for its keys yet."""
    gate_lr_factor: PositiveFloat = 33.0
    """Factor of the learning rate of beta, the gate between memory and attention. With the usual rate it stays where it
    starts."""


@dataclass(frozen=True)
class _Segments:
    """Tokens in segments: keys by their offset in the segment, queries from the first column on.

    Attributes:
        keys: Blocks of C columns.
        queries: Blocks of w columns.
        query_columns_Bnw: int64 key column of each query; None: it is the query's own column.
        is_first_Bn: bool, whether the segment is its document's first.
    """

    keys: AlignedBlocks
    queries: AlignedBlocks
    query_columns_Bnw: Tensor | None
    is_first_Bn: Tensor


class InfiniMixer(Mixer):
    """Infini-attention with the linear or the delta rule."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        segment_length: int,
        is_delta: bool,
        rope_theta: float,
        init_std: float,
        output_std: float,
        gate_lr_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.segment_length, self.is_delta, self.rope_theta = segment_length, is_delta, rope_theta
        self.gate_lr_factor = gate_lr_factor
        self.query = Linear(hidden_size, num_heads * head_dim, init_std)
        self.key = Linear(hidden_size, num_kv_heads * head_dim, init_std)
        self.value = Linear(hidden_size, num_kv_heads * head_dim, init_std)
        self.output = Linear(num_heads * head_dim, hidden_size, output_std)
        self.beta = nn.Parameter(torch.empty(num_heads))

    def initial_values(self) -> dict[str, InitialValue]:
        return {"beta": Constant(0.0)}

    def optim_rules(self) -> dict[str, OptimRule]:
        return {"beta": OptimRule(self.gate_lr_factor, weight_decay=False)}

    def new_state(self, spec: CacheSpec) -> RecurrentState:
        wide = torch.promote_types(spec.dtype, torch.float32)
        columns = min(self.segment_length, spec.max_length)
        shape = (spec.batch_size, columns, self.num_kv_heads, self.head_dim)
        held = {name: torch.zeros(shape, dtype=spec.dtype, device=spec.device) for name in ("keys", "values")}
        return RecurrentState(held | self._empty_memories(spec.batch_size, wide, spec.device), self._advance)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        q_BSHd, k_BSGd, v_BSGd = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        # Attention is local, so angles by the offset in the segment give the same scores as angles by the position.
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        angles = context.block_angles(self.segment_length, self.head_dim, self.rope_theta, wide)
        offsets_BS = context.tokens.offsets_BS
        new = {
            "queries": q_BSHd,
            "keys": k_BSGd,
            "values": v_BSGd,
            "rotated_queries": apply_rotary(q_BSHd.transpose(1, 2), *angles).transpose(1, 2),
            "rotated_keys": apply_rotary(k_BSGd.transpose(1, 2), *angles).transpose(1, 2),
            "offsets": offsets_BS.expand(len(x_BSD), -1),
        }
        if context.state is not None:
            columns = context.state.tensors["keys"].shape[1]
            place = partial(context.state_blocks, self.segment_length, len(x_BSD), columns)
            keys, queries = place(), place(is_compact=True) if x_BSD.shape[1] < columns else None
            advance = partial(self._advance, keys=keys, queries=queries)
            memory_BSHd, local_BSHd = context.state.append(new, advance)
        elif context.sharing is not None:
            memory_BSHd, local_BSHd = map(join_chunks, self._mix_chunks(new, context.sharing, wide))
        else:
            blocks = context.aligned_blocks(self.segment_length)
            segments = _Segments(blocks, blocks, None, blocks.split(offsets_BS < self.segment_length).any(2))
            tensors = self._empty_memories(len(x_BSD), wide, x_BSD.device)
            _, (memory_BSHd, local_BSHd) = self._mix(tensors, new, segments)
        gate_H1 = self.beta.to(wide).sigmoid().unsqueeze(-1)
        mixed_BSHd = gate_H1 * memory_BSHd + (1 - gate_H1) * local_BSHd
        return self.output(mixed_BSHd.flatten(2).to(x_BSD.dtype)), context.shared

    def _mix_chunks(self, new: Tensors, ranks: ContextRanks, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mix rows that ranks share: chunks are whole segments of one document, and only memories are handed on."""
        chunks = {name: split_chunks(tensor) for name, tensor in new.items()}
        before, offsets = memory_before(chunks["keys"].to(wide), chunks["values"].to(wide), ranks), chunks["offsets"]
        tensors = self._empty_memories(len(offsets), wide, offsets.device)
        tensors |= {"committed_matrix": before.matrix, "committed_total": before.total}
        blocks = align(offsets, self.segment_length)
        segments = _Segments(blocks, blocks, None, blocks.split(offsets < self.segment_length).any(2))
        return self._mix(tensors, chunks, segments)[1]

    def _empty_memories(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Tensors:
        shape = (batch_size, self.num_kv_heads, self.head_dim, self.head_dim)
        tensors = {}
        for name in ("committed", "pending"):
            tensors[f"{name}_matrix"] = torch.zeros(shape, dtype=dtype, device=device)
            tensors[f"{name}_total"] = torch.zeros(shape[:-1], dtype=dtype, device=device)
        return tensors

    def _advance(
        self,
        tensors: Tensors,
        new: Tensors,
        valid_BS: Tensor | None,
        keys: AlignedBlocks | None = None,
        queries: AlignedBlocks | None = None,
    ) -> tuple[Tensors, Any]:
        offsets_BS, size = new["offsets"], self.segment_length
        columns, query_columns_Bnw = tensors["keys"].shape[1], None
        keys = keys or align(offsets_BS, size, valid_BS, columns)
        if offsets_BS.shape[1] < columns:
            queries = queries or align(offsets_BS, size, valid_BS, columns, is_compact=True)
            query_columns_Bnw = queries.split(offsets_BS % size)
        is_first_Bn = keys.split(offsets_BS < size).any(2)
        return self._mix(tensors, new, _Segments(keys, queries or keys, query_columns_Bnw, is_first_Bn))

    def _mix(self, tensors: Tensors, new: Tensors, segments: _Segments) -> tuple[Tensors, tuple[Tensor, Tensor]]:
        """Take in new tokens: return the next state, what the memory and what attention give them [B, S, H, d]."""
        local_BSHd, columns = self._attend(tensors, new, segments)
        memory_BSHd, memories = self._remember(tensors, new, segments)
        return columns | memories, (memory_BSHd, local_BSHd)

    def _attend(self, tensors: Tensors, new: Tensors, segments: _Segments) -> tuple[Tensor, Tensors]:
        """Attend within segments; in a state, the first one begins with the keys and values that have come earlier."""
        blocks, held, state_dtype = segments.keys, {}, tensors.get("keys", new["keys"]).dtype
        offsets_BS = new["offsets"]
        columns_C = torch.arange(blocks.width, device=offsets_BS.device)
        for name, own_BSGd in (("keys", new["rotated_keys"]), ("values", new["values"])):
            own_BnCGd = blocks.split(own_BSGd.to(state_dtype))
            if name in tensors:
                is_before_BC = columns_C < offsets_BS[:, :1] % self.segment_length
                first_BCGd = torch.where(is_before_BC[..., None, None], tensors[name], own_BnCGd[:, 0])
                own_BnCGd = torch.cat((first_BCGd.unsqueeze(1), own_BnCGd[:, 1:]), dim=1)
            held[name] = own_BnCGd
        # (B, n, C, G, d) -> (B*n, G, C, d): each segment is a sequence of its own.
        k_bGCd, v_bGCd = (part.flatten(0, 1).transpose(1, 2) for part in (held["keys"], held["values"]))
        q_BnwHd = segments.queries.split(new["rotated_queries"].to(state_dtype))
        mask_b1wC = None
        if segments.query_columns_Bnw is not None:
            mask_b1wC = (columns_C <= segments.query_columns_Bnw.flatten(0, 1).unsqueeze(-1)).unsqueeze(1)
        mixed_bHwd = attend(q_BnwHd.flatten(0, 1).transpose(1, 2), k_bGCd, v_bGCd, mask_b1wC)
        mixed_BnwHd = mixed_bHwd.transpose(1, 2).unflatten(0, q_BnwHd.shape[:2])
        local_BSHd = segments.queries.join(mixed_BnwHd, offsets_BS.shape[1])
        return local_BSHd, {name: blocks.last(columns) for name, columns in held.items()}

    def _remember(self, tensors: Tensors, new: Tensors, segments: _Segments) -> tuple[Tensor, Tensors]:
        """Read the memory of the segments before, and write each segment to it once it is full."""
        blocks, wide = segments.keys, tensors["pending_matrix"].dtype
        committed = Memory(tensors["committed_matrix"], tensors["committed_total"])
        pending = Memory(tensors["pending_matrix"], tensors["pending_total"])
        k_BnGCd, v_BnGCd = (blocks.split(new[name].to(wide)).transpose(2, 3) for name in ("keys", "values"))
        filled_BnC = blocks.split(torch.ones_like(new["offsets"], dtype=torch.bool))
        rows = len(k_BnGCd)
        writes = SegmentWrites(
            k_BnGCd,
            v_BnGCd,
            filled_BnC,
            begins_Bn=blocks.begins_Bn.expand(rows, -1),
            is_full_Bn=blocks.is_full_Bn.expand(rows, -1),
            is_first_Bn=segments.is_first_Bn.expand(rows, -1),
            last_B=blocks.last_B.expand(rows),
        )
        write_all = write_by_delta_rule if self.is_delta else write_by_linear_rule
        entering, committed, pending = write_all(writes, committed, pending)
        q_BnwHd = segments.queries.split(new["queries"].to(wide))
        batch, number, width, heads, size = q_BnwHd.shape
        # The query heads of a group are further queries of one head. (B, n, w, G, r, d) -> (B, n, G, w*r, d)
        q_BnGsd = q_BnwHd.unflatten(3, (self.num_kv_heads, -1)).transpose(2, 3).flatten(3, 4)
        found_BnGsd = read(q_BnGsd, entering, segments.is_first_Bn)
        found_BnwHd = found_BnGsd.unflatten(3, (width, -1)).transpose(2, 3).reshape(batch, number, width, heads, size)
        memory_BSHd = segments.queries.join(found_BnwHd, new["offsets"].shape[1])
        named = {"committed": committed, "pending": pending}
        return memory_BSHd, {
            f"{name}_{part}": getattr(memory, part) for name, memory in named.items() for part in ("matrix", "total")
        }


def _build(spec: MixerSpec) -> InfiniMixer:
    model, section = spec.model, spec.section
    return InfiniMixer(
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.attention_kv_heads,
        head_dim=model.attention_head_dim,
        segment_length=section.segment_length,
        is_delta=section.memory == "delta",
        rope_theta=model.rope_theta,
        init_std=model.init_std,
        output_std=spec.output_std,
        gate_lr_factor=section.gate_lr_factor,
    )


def _check_length(section: InfiniConfig, length: int) -> None:
    if length <= section.segment_length:
        raise UsageError(
            f"train.sequence_length ({length}) must be above model.infini.segment_length ({section.segment_length}): "
            "else the memory is never read"
        )


def _obstacle(model: ModelConfig, section: InfiniConfig, chunk: int) -> str | None:
    if section.memory == "delta":
        return "model.infini.memory ('delta') reads what all segments before have written"
    if chunk % section.segment_length:
        size = section.segment_length
        return f"a rank's chunk, {chunk} tokens, must be a multiple of model.infini.segment_length ({size})"
    return "model.isolate_documents (True) lets segments begin on another rank" if model.isolate_documents else None


def _state_bytes(spec: MixerSpec, length: int, element_bytes: int) -> int:
    heads, size = spec.model.attention_kv_heads, spec.model.attention_head_dim
    memories = 2 * heads * (size * size + size) * max(4, element_bytes)
    return memories + 2 * heads * size * min(length, spec.section.segment_length) * element_bytes


def _flops(spec: MixerSpec, length: int) -> float:
    """Count local attention over the mean number of keys, a read of d^2 per query head, and a write per key head."""
    heads, kv_heads, size = spec.model.num_heads, spec.model.attention_kv_heads, spec.model.attention_head_dim
    segment = min(length, spec.section.segment_length)
    written = 4 if spec.section.memory == "delta" else 2
    return 2 * heads * size * (segment + 1) + 2 * heads * size**2 + written * kv_heads * size**2


def _cost(spec: MixerSpec) -> MixerCost:
    model, size = spec.model, spec.model.attention_head_dim
    queries, keys = model.num_heads * size, model.attention_kv_heads * size
    # Queries and keys are rotated; their features and what is read are in fp32. The delta rule reads for keys too.
    of_keys = 11 if spec.section.memory == "delta" else 5
    return MixerCost(
        products=(
            Product(model.hidden_size, queries),
            Product(model.hidden_size, keys, count=2),
            Product(queries, model.hidden_size),
        ),
        kept=model.hidden_size + 3 * queries + 3 * keys,
        kept_fp32=6 * queries + of_keys * keys + model.num_heads,
        work=6 * queries,
        elementwise=(Elementwise(queries + keys, 36, 40), Elementwise(queries, 60, 80)),
        attention=Attention(model.num_heads, size, spec.section.segment_length),
    )


def _shapes(model: ModelConfig, section: InfiniConfig) -> dict[str, Any]:
    return {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.attention_kv_heads,
        "model.head_dim": model.attention_head_dim,
        "model.infini.segment_length": section.segment_length,
        "model.infini.memory": section.memory,
    }


INFINI = MixerKind(
    _build,
    _state_bytes,
    _flops,
    _cost,
    section=InfiniConfig,
    shapes=_shapes,
    check_length=_check_length,
    reads=frozenset({"num_heads", "num_kv_heads", "head_dim", "rope_theta"}),
    part_obstacle=_obstacle,
)
