"""Flat ranges of the state that DeepSpeed's ZeRO optimizers hold: weights, moments and gradients of this rank.

Stages 1 and 2 map each parameter to a range of a flat partition; stage 3 gives each rank an equal share of every
parameter, the last ones padded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.checkpoint.sharded_state import Fragment, squares_and_faults
from moe_train.distributed.collectives import Group, group_rank
from moe_train.model.parameters import LogicalTensor
from moe_train.train.engine.optimizers.base import FlatPart, OptimizerKind

NamedParameters = Sequence[tuple[nn.Parameter, LogicalTensor]]


class ZeroState(ABC):
    """State in a ZeRO optimizer of DeepSpeed: one subclass for stages 1 and 2, one for stage 3."""

    def __init__(
        self, zero: Any, parameters: NamedParameters, optimizer: OptimizerKind, matrices: Mapping[str, int]
    ) -> None:
        """Give access to the state of an optimizer.

        Args:
            zero: DeepSpeed's optimizer.
            parameters: Parameters of the model, each with its logical tensor.
            optimizer: Kind of the inner optimizer.
            matrices: For each parameter that it treats as matrices, by name, how many are side by side in it.
        """
        self._zero, self._parameters, self._optimizer, self._matrices = zero, parameters, optimizer, matrices
        if optimizer.matrix_moments is not None:
            self._bind_matrices()

    def fragments(self) -> Iterator[Fragment]:
        """Yield the ranges of weights and moments that this rank owns; every element of the model has one owner."""
        self._create_state()
        for parameter, tensor in self._parameters:
            fragment = self._fragment(parameter, tensor)
            if fragment is not None and fragment.numel:
                yield fragment

    def gradient_sums(self, scale: float) -> dict[str, Tensor]:
        """Compute `squares_and_faults` of this rank's part of each gradient, before the update.

        Args:
            scale: Loss scale that the gradients are multiplied by.
        """
        found = ((tensor, self._gradient(parameter)) for parameter, tensor in self._parameters)
        return {tensor.name: squares_and_faults(grad / scale) for tensor, grad in found if grad is not None}

    def set_step(self, optimizer_step: int) -> None:
        """Set the number of updates that the optimizer has made."""
        for flat in self._flat_partitions():
            if self._optimizer.counts_steps:
                self._zero.optimizer.state[flat]["step"].fill_(float(optimizer_step))

    @property
    def step(self) -> int:
        """Number of updates that the optimizer has made; 0 where it does not count them."""
        states = [self._zero.optimizer.state[flat] for flat in self._flat_partitions()]
        return int(states[0]["step"]) if self._optimizer.counts_steps and states and states[0] else 0

    def _bind_matrices(self) -> None:
        """Tell the inner optimizer where the matrices lie in their partitions."""
        for index, flat in enumerate(self._flat_partitions()):
            found = [
                (parameter, self._part(parameter, self._matrices[tensor.name]))
                for parameter, tensor in self._parameters
                if self._flat_index(parameter) == index and tensor.name in self._matrices
            ]
            if found:
                group = self._group_of(found[0][0], index)
                self._zero.optimizer.bind(flat, [part for _, part in found], group)

    def _moments_of(self, tensor: LogicalTensor) -> tuple[str, ...]:
        return self._optimizer.moments_of(tensor.name in self._matrices)

    @abstractmethod
    def forget_gradients(self) -> None:
        """Forget the gradients of a step whose update is skipped."""

    @abstractmethod
    def refresh_working_weights(self) -> None:
        """Copy the fp32 weights to those that the model computes with. Collective: all ranks."""

    @abstractmethod
    def _flat_partitions(self) -> list[Tensor]:
        """Return the fp32 partitions that the inner optimizer updates and keys its state by."""

    @abstractmethod
    def _flat_index(self, parameter: nn.Parameter) -> int:
        """Find the partition, among `_flat_partitions`, in which a parameter is on some rank."""

    @abstractmethod
    def _group_of(self, parameter: nn.Parameter, index: int) -> Group:
        """Find the ranks that share a partition."""

    @abstractmethod
    def _part(self, parameter: nn.Parameter, beside: int) -> FlatPart:
        """Find where this rank's range of a parameter lies."""

    @abstractmethod
    def _fragment(self, parameter: nn.Parameter, tensor: LogicalTensor) -> Fragment | None:
        """Find this rank's range of a parameter; None: another rank owns all of it."""

    @abstractmethod
    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Find this rank's range of a gradient; None: another rank owns all of it."""

    def _create_state(self) -> None:
        states, matrices = self._zero.optimizer.state, set()
        for parameter, tensor in self._parameters:
            if tensor.name in self._matrices:
                matrices.add(self._flat_index(parameter))
        for index, flat in enumerate(self._flat_partitions()):
            if not states[flat]:
                states[flat] = self._optimizer.new_state(flat, index in matrices)


class MappedState(ZeroState):
    """State of ZeRO stages 1 and 2."""

    _places: dict[int, int] | None = None
    _divisor: Callable[[int], float] | None = None

    def divide_gradients(self, divisor: Callable[[int], float]) -> None:
        """Divide each gradient by what its parameter group's gradients have yet to be divided by."""
        self._divisor = divisor

    def forget_gradients(self) -> None:
        # With offload, DeepSpeed (0.19.8) keeps the fp32 sums of a skipped step, and adds the next step to them.
        self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)

    def refresh_working_weights(self) -> None:
        self._zero.update_lp_params()

    def _flat_partitions(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _fragment(self, parameter: nn.Parameter, tensor: LogicalTensor) -> Fragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place = mapping.lp_fragment_address
        # DeepSpeed links optimizer state to parameters after its first group's first step, when the other groups have
        # none yet; so the moments are looked up where they are kept.
        flat, within = self._flat_partitions()[mapping.param_group_index], mapping.get_hp_fragment_address()
        moments = {name: self._zero.optimizer.state[flat][name] for name in self._moments_of(tensor)}
        whole = {"weight": flat.detach()} | moments
        states = {kind: state.narrow(0, within.start, within.numel) for kind, state in whole.items()}
        return Fragment(tensor, tensor.start + place.start, place.numel, states)

    def _flat_index(self, parameter: nn.Parameter) -> int:
        if self._places is None:
            groups = self._zero.bit16_groups
            self._places = {id(each): index for index, group in enumerate(groups) for each in group}
        return self._places[id(parameter)]

    def _group_of(self, parameter: nn.Parameter, index: int) -> Group:
        return self._zero.real_dp_process_group[index]

    def _part(self, parameter: nn.Parameter, beside: int) -> FlatPart:
        shape, mapping = tuple(parameter.shape), parameter._hp_mapping
        stacked = shape[0] if len(shape) == 3 else 1
        if mapping is None:
            return FlatPart(shape, stacked, beside, 0, 0, 0)
        place, within = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        return FlatPart(shape, stacked, beside, place.start, within.start, place.numel)

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place = mapping.lp_fragment_address
        gradient: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        if gradient.numel() == parameter.numel():  # bf16 keeps a buffer of the whole on each rank
            gradient = gradient.narrow(0, place.start, place.numel)
        return gradient if self._divisor is None else gradient / self._divisor(mapping.param_group_index)


class PartitionedState(ZeroState):
    """State of ZeRO stage 3."""

    def forget_gradients(self) -> None:
        """Forget nothing: the first micro-batch of the next step writes over them."""

    def refresh_working_weights(self) -> None:
        # As in DeepSpeed's own step: gathered parameters are freed, because they would keep the old values.
        self._zero._partition_all_parameters()
        for index in range(len(self._zero.fp16_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _flat_partitions(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _fragment(self, parameter: nn.Parameter, tensor: LogicalTensor) -> Fragment:
        size = parameter.ds_tensor.ds_numel
        start = group_rank(parameter.ds_process_group) * size
        numel = max(0, min(size, tensor.numel - start))  # the last partitions may be padding, in part or whole
        kinds = {"weight": None} | {name: name for name in self._moments_of(tensor)}
        states = {
            kind: self._zero._get_fp32_opt_state_partition(parameter, False, key)[0][:numel].detach()
            for kind, key in kinds.items()
        }
        return Fragment(tensor, tensor.start + start, numel, states)

    def _flat_index(self, parameter: nn.Parameter) -> int:
        return self._zero.grad_position[self._zero.get_param_id(parameter)][0]

    def _group_of(self, parameter: nn.Parameter, index: int) -> Group:
        return parameter.ds_process_group

    def _part(self, parameter: nn.Parameter, beside: int) -> FlatPart:
        shape, size = tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel
        start = group_rank(parameter.ds_process_group) * size
        numel = max(0, min(size, parameter.ds_numel - start))
        offset = self._zero.grad_position[self._zero.get_param_id(parameter)][1]
        stacked = shape[0] if len(shape) == 3 else 1
        return FlatPart(shape, stacked, beside, min(start, parameter.ds_numel), offset, numel)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        return torch.as_tensor(self._zero.get_local_fp32_grad_for_param(parameter))
