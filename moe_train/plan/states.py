"""Model states of one rank under DeepSpeed ZeRO, as the trainer sets it up (deepspeed 0.19.8).

Stages 1 and 2: every rank has all dense weights and the weights of its experts, in flat groups. Of each group it has
fp32 master weights and the optimizer's moments for one part. Dense groups are divided among all ranks, expert groups
among the expert-data-parallel ranks.
Stage 3: every tensor is divided separately, its working weights too. Tensors of up to 100,000 elements are not divided.
"""

import math
from dataclasses import dataclass

from moe_train.model.parameters import LogicalTensor
from moe_train.plan.layout import Layout
from moe_train.plan.shapes import ModelShape

_FP32_BYTES = 4
_ALIGNMENT = 2  # elements; partitions are multiples of it, for NCCL
_LARGEST_EXPERT_GROUP = 178_956_971  # elements; a larger group of experts is split
_PERSISTENT_ELEMENTS = 100_000  # stage3_param_persistence_threshold
_REUSE_ELEMENTS = 1_000_000_000  # stage3_max_reuse_distance


@dataclass(frozen=True)
class Group:
    """Group of tensors that the optimizer updates as one.

    Attributes:
        numel: Elements on this rank before ZeRO.
        partition: Elements that this rank updates.
        ranks: Number of ranks that share the group.
        is_expert: Whether the tensors are experts.
        largest: Elements of its largest tensor on this rank before ZeRO.
        num_moments: State tensors that the optimizer has for it.
        is_matrix: Whether the optimizer treats its tensors as whole matrices.
    """

    numel: int
    partition: int
    ranks: int
    is_expert: bool
    largest: int
    num_moments: int = 2
    is_matrix: bool = False


@dataclass(frozen=True)
class Cut:
    """Tensors that stage 3 divides among the same ranks.

    Attributes:
        is_expert: Whether the tensors are experts.
        passing: Elements of the tensors that are gathered in every pass.
        num_passing: Number of these tensors.
        staying: Elements of the tensors that are not divided, and are gathered after the update.
        num_staying: Number of these tensors.
    """

    is_expert: bool
    passing: int
    num_passing: int
    staying: int
    num_staying: int


@dataclass(frozen=True)
class ModelStates:
    """Model states that one rank keeps from step to step.

    Attributes:
        weights: Bytes of the working weights.
        optimizer_states: Bytes of the fp32 master weights and of the optimizer's moments.
        groups: Groups that the optimizer updates, one after the other.
        gathered: Stage 3: bytes of the weights of other ranks that are present while a pass goes through the blocks.
        cuts: Stage 3: tensors that are gathered, dense tensors and experts.
    """

    weights: int
    optimizer_states: int
    groups: tuple[Group, ...]
    gathered: int
    cuts: tuple["Cut", ...] = ()

    @property
    def local_elements(self) -> int:
        """Elements of all tensors on this rank before ZeRO."""
        return sum(group.numel for group in self.groups)

    @property
    def partition_elements(self) -> int:
        """Elements that this rank updates."""
        return sum(group.partition for group in self.groups)

    @property
    def moment_elements(self) -> int:
        """Elements of the optimizer's moments on this rank."""
        return sum(group.num_moments * group.partition for group in self.groups)


def state_elements(shape: ModelShape, layout: Layout) -> int:
    """Count the elements of the fp32 master weights and moments of the whole model, as a checkpoint has them."""
    kind = layout.optimizer_kind
    return sum((1 + len(kind.moments_of(t.name in shape.matrices))) * t.global_numel for t in shape.tensors)


def model_states(shape: ModelShape, layout: Layout) -> ModelStates:
    """Compute the model states of one rank.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
    """
    dense = [tensor for tensor in shape.tensors if not tensor.is_expert]
    experts = [tensor for tensor in shape.tensors if tensor.is_expert]
    whole = shape.matrices if layout.optimizer_kind.matrix_moments is not None else {}
    maps = [tensor for tensor in dense if tensor.name in whole]
    tables = [tensor for tensor in dense if len(tensor.shape) > 1 and tensor.name not in whole]
    vectors = [tensor for tensor in dense if len(tensor.shape) == 1]
    listed = [(maps, False), (tables, False), (vectors, False), *((part, True) for part in _divided(experts, layout))]
    groups = tuple(
        _group(tensors, is_expert, layout, tensors[0].name in whole) for tensors, is_expert in listed if tensors
    )
    updated = sum(group.partition for group in groups)
    optimizer_states = _FP32_BYTES * sum((1 + group.num_moments) * group.partition for group in groups)
    if layout.zero_stage < 3:
        weights = sum(group.partition * group.ranks for group in groups) * layout.dtype_bytes
        return ModelStates(weights, optimizer_states, groups, 0)
    cuts = tuple(_cut(tensors, kind, layout) for tensors, kind in ((dense, False), (experts, True)) if tensors)
    persistent, others = sum(cut.staying for cut in cuts), sum(cut.passing for cut in cuts)
    # A weight stays from its forward to its backward pass, unless more than _REUSE_ELEMENTS others are used in between.
    block = max((layer.dense + layer.experts // layout.ep_size for layer in shape.layers), default=0)
    live = min(others, _REUSE_ELEMENTS // 2 + block)
    weights = (updated + persistent) * layout.dtype_bytes
    return ModelStates(weights, optimizer_states, groups, live * layout.dtype_bytes, cuts)


def _cut(tensors: list[LogicalTensor], is_expert: bool, layout: Layout) -> Cut:
    numels = [_numel(tensor, layout) for tensor in tensors] if _ranks(is_expert, layout) > 1 else []
    passing = [numel for numel in numels if numel > _PERSISTENT_ELEMENTS]
    staying = [numel for numel in numels if numel <= _PERSISTENT_ELEMENTS]
    return Cut(is_expert, sum(passing), len(passing), sum(staying), len(staying))


def _divided(experts: list[LogicalTensor], layout: Layout) -> list[list[LogicalTensor]]:
    parts: list[list[LogicalTensor]] = [[]]
    size = 0
    for tensor in experts:
        numel = _numel(tensor, layout)
        if parts[-1] and size + numel > _LARGEST_EXPERT_GROUP:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += numel
    return parts


def _group(tensors: list[LogicalTensor], is_expert: bool, layout: Layout, is_matrix: bool) -> Group:
    numels, ranks = [_numel(tensor, layout) for tensor in tensors], _ranks(is_expert, layout)
    if layout.zero_stage == 3:
        partition = sum(-(-numel // ranks) for numel in numels)
    else:
        partition = math.ceil(sum(numels) / (_ALIGNMENT * ranks)) * _ALIGNMENT
    num_moments = len(layout.optimizer_kind.moments_of(is_matrix))
    return Group(sum(numels), partition, ranks, is_expert, max(numels), num_moments, is_matrix)


def _numel(tensor: LogicalTensor, layout: Layout) -> int:
    return tensor.global_numel // layout.ep_size if tensor.is_expert else tensor.global_numel


def _ranks(is_expert: bool, layout: Layout) -> int:
    return layout.edp_size if is_expert else layout.world_size
