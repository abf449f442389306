"""Flat ranges of the state that DeepSpeed's ZeRO optimizers hold: weights, moments and gradients of this rank.

Stages 1 and 2 map each parameter to a range of a flat partition; stage 3 gives each rank an equal share of every
parameter, the last ones padded.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.checkpoint.sharded_state import Fragment, squares_and_faults
from moe_train.distributed.collectives import group_rank
from moe_train.model.parameters import LogicalTensor
from moe_train.train.engine.optimizers.base import OptimizerKind

NamedParameters = Sequence[tuple[nn.Parameter, LogicalTensor]]


class ZeroState(ABC):
    """State in a ZeRO optimizer of DeepSpeed: one subclass for stages 1 and 2, one for stage 3."""

    def __init__(self, zero: Any, parameters: NamedParameters, optimizer: OptimizerKind) -> None:
        """Give access to the state of an optimizer.

        Args:
            zero: DeepSpeed's optimizer.
            parameters: Parameters of the model, each with its logical tensor.
            optimizer: Kind of the inner optimizer.
        """
        self._zero, self._parameters, self._optimizer = zero, parameters, optimizer

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

    @abstractmethod
    def refresh_working_weights(self) -> None:
        """Copy the fp32 weights to those that the model computes with. Collective: all ranks."""

    @abstractmethod
    def _flat_partitions(self) -> list[Tensor]:
        """Return the fp32 partitions that the inner optimizer updates and keys its state by."""

    @abstractmethod
    def _fragment(self, parameter: nn.Parameter, tensor: LogicalTensor) -> Fragment | None:
        """Find this rank's range of a parameter; None: another rank owns all of it."""

    @abstractmethod
    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Find this rank's range of a gradient; None: another rank owns all of it."""

    def _create_state(self) -> None:
        states = self._zero.optimizer.state
        for flat in self._flat_partitions():
            if not states[flat]:
                states[flat] = self._optimizer.new_state(flat)


class MappedState(ZeroState):
    """State of ZeRO stages 1 and 2."""

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
        moments = {name: self._zero.optimizer.state[flat][name] for name in self._optimizer.moments}
        whole = {"weight": flat.detach()} | moments
        states = {kind: state.narrow(0, within.start, within.numel) for kind, state in whole.items()}
        return Fragment(tensor, tensor.start + place.start, place.numel, states)

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place = mapping.lp_fragment_address
        gradient: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        if gradient.numel() == parameter.numel():  # bf16 keeps a buffer of the whole on each rank
            gradient = gradient.narrow(0, place.start, place.numel)
        return gradient


class PartitionedState(ZeroState):
    """State of ZeRO stage 3."""

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
        kinds = {"weight": None} | {name: name for name in self._optimizer.moments}
        states = {
            kind: self._zero._get_fp32_opt_state_partition(parameter, False, key)[0][:numel].detach()
            for kind, key in kinds.items()
        }
        return Fragment(tensor, tensor.start + start, numel, states)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        return torch.as_tensor(self._zero.get_local_fp32_grad_for_param(parameter))
