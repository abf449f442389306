"""Parameters as logical tensors (a name, a global shape, and the flat range of this rank) and their initial values.

Modules state the initial values of their own parameters in `initial_values`, so that no other code knows their names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moe_train.ops.keyed_random import fill_normal_, make_key


@dataclass(frozen=True)
class Normal:
    """Initial values drawn from a normal distribution with mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Initial values that are all the same."""

    value: float


@dataclass(frozen=True)
class Computed:
    """Initial values that are a function of an element's place, such as decays that differ by channel.

    Attributes:
        function: Function from places in the flattened global tensor, as fp64 numbers, to fp64 values.
    """

    function: Callable[[Tensor], Tensor]


InitialValue = Normal | Constant | Computed


@dataclass(frozen=True)
class OptimRule:
    """Rule for how the optimizer treats a parameter.

    Attributes:
        lr_factor: Factor of the learning rate.
        weight_decay: Whether weight decay applies.
        matrices: Number of linear maps that a parameter stores side by side along its outputs, for optimizers that
            treat a matrix as a whole; of experts, those of each one. 0: it is updated element by element.
    """

    lr_factor: float = 1.0
    weight_decay: bool = True
    matrices: int = 0


@runtime_checkable
class OwnsParameters(Protocol):
    """A module with parameters or buffers of its own."""

    def initial_values(self) -> dict[str, InitialValue]:
        """Return the initial values of its own parameters and buffers, by attribute name."""


@runtime_checkable
class HasOptimRules(Protocol):
    """A module with parameters that have optimizer rules of their own."""

    def optim_rules(self) -> dict[str, OptimRule]:
        """Return rules by attribute name; a parameter that is not named gets the usual rule."""


@dataclass(frozen=True)
class LogicalTensor:
    """A parameter as all ranks together see it.

    Attributes:
        name: Name of the parameter in the model, the same on every rank.
        shape: Global shape; [E, ...] for experts.
        start: Place of this rank's first element in the flattened global tensor.
        numel: Number of elements that this rank's module holds, from start on; for experts, a part of the tensor.
        is_expert: Whether the tensor is sharded over the expert-parallel group.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    is_expert: bool

    @property
    def global_numel(self) -> int:
        """Number of elements of the whole tensor."""
        return torch.Size(self.shape).numel()


class ExpertParameter(nn.Parameter):
    """A parameter whose first dimension is this rank's experts: of num_experts experts, those from first_expert on."""

    num_experts: int
    first_expert: int

    @staticmethod
    def create(data: Tensor, num_experts: int, first_expert: int) -> "ExpertParameter":
        """Make a parameter [e, ...] of the experts first_expert .. first_expert + e - 1 of num_experts."""
        parameter = ExpertParameter(data)
        parameter.num_experts, parameter.first_expert = num_experts, first_expert
        return parameter


def logical_tensor(name: str, parameter: nn.Parameter) -> LogicalTensor:
    """Make the logical tensor of a parameter, before an engine shards it further."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, ExpertParameter):
        return LogicalTensor(name, shape, 0, parameter.numel(), is_expert=False)
    per_expert = torch.Size(shape[1:]).numel()
    start = parameter.first_expert * per_expert
    return LogicalTensor(name, (parameter.num_experts, *shape[1:]), start, parameter.numel(), is_expert=True)


def logical_tensors(model: nn.Module) -> dict[str, LogicalTensor]:
    """List every logical tensor of a model by name; a tensor that two modules share is listed once."""
    return {name: logical_tensor(name, parameter) for name, parameter in model.named_parameters()}


def optim_rules(model: nn.Module) -> dict[str, OptimRule]:
    """Find the rule of every parameter by name: its module's own, or weight decay for matrices and none for vectors."""
    rules: dict[str, OptimRule] = {}
    for module_name, module in model.named_modules():
        own: dict[str, OptimRule] = module.optim_rules() if isinstance(module, HasOptimRules) else {}
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{attribute}" if module_name else attribute
            rules[name] = own.get(attribute, OptimRule(weight_decay=parameter.dim() >= 2))
    return {name: rules[name] for name, _ in model.named_parameters()}


def materialize(model: nn.Module, *, seed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model built on the meta device its memory and initial values, one parameter at a time.

    An element's value depends on the seed, its tensor's name and its place in the logical tensor. So every layout
    begins with the same weights, and no rank ever holds more than its own.

    Args:
        model: Model with all parameters on the meta device.
        seed: Seed of the run.
        dtype: dtype of the parameters.
        device: Device of the parameters.
    """

    def fill(data: Tensor, place: LogicalTensor, initial: InitialValue) -> None:
        match initial:
            case Constant(value):
                data.fill_(value)
            case Normal(std):
                fill_normal_(data, make_key(seed, "parameter", place.name), place.start, std)
            case Computed(function):
                end = place.start + data.numel()
                places = torch.arange(place.start, end, dtype=torch.float64, device=data.device)
                data.copy_(function(places).view_as(data))

    allocate(model, fill, dtype=dtype, device=device)


def allocate(
    model: nn.Module,
    fill: Callable[[Tensor, LogicalTensor, InitialValue], None],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give a model built on the meta device its memory, one parameter at a time. Buffers get their initial values.

    Args:
        model: Model with all parameters on the meta device.
        fill: Function that writes a parameter's values, given its logical tensor and the tensor's initial values.
        dtype: dtype of the parameters.
        device: Device of the parameters.
    """
    shared: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in shared:
                assert isinstance(module, OwnsParameters), f"{type(module).__name__} has no initial values"
                name = f"{module_name}.{attribute}" if module_name else attribute
                data = torch.empty(parameter.shape, dtype=dtype, device=device)
                fill(data, logical_tensor(name, parameter), module.initial_values()[attribute])
                shared[id(parameter)] = _like(parameter, data)
            setattr(module, attribute, shared[id(parameter)])
        for attribute, buffer in list(module.named_buffers(recurse=False)):
            assert isinstance(module, OwnsParameters), f"{type(module).__name__} has no initial value of {attribute}"
            value = module.initial_values()[attribute]
            assert isinstance(value, Constant), "a buffer is the same on every rank"
            # In its own dtype: a buffer that the optimizer does not see is as wide as its rule needs.
            setattr(module, attribute, torch.full(buffer.shape, value.value, dtype=buffer.dtype, device=device))


def _like(old: nn.Parameter, data: Tensor) -> nn.Parameter:
    if isinstance(old, ExpertParameter):
        return ExpertParameter.create(data, old.num_experts, old.first_expert)
    return nn.Parameter(data)
