"""Experts under DeepSpeed: process groups, marks of parameters, parameter groups of the optimizer, and an engine.

DeepSpeed recognises experts only in its own layer classes. `ExpertEngine` tells it about ours; for this, an expert
parameter must carry allreduce = False and the name of its group (deepspeed 0.19.8).
"""

from dataclasses import replace
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.utils import groups
from torch import nn

from moe_train.config.run import OptimConfig
from moe_train.distributed.bootstrap import destroy_process_groups
from moe_train.distributed.mesh import ParallelMesh
from moe_train.model.parameters import ExpertParameter, OptimRule, optim_rules
from moe_train.model.transformer import Transformer

_USUAL_RULES = {OptimRule(weight_decay=True): "decay", OptimRule(weight_decay=False): "no_decay"}


class ExpertEngine(DeepSpeedEngine):
    """DeepSpeed's engine for a model that has experts, but none of DeepSpeed's own layer classes."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        # DeepSpeed casts buffers with the weights; a bias in bf16 could not take a step of a thousandth.
        wide = dict(model.named_buffers())
        super()._configure_distributed_model(model)
        for name, buffer in wide.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, buffer.to(self.device))
        experts = [p for p in model.parameters() if isinstance(p, ExpertParameter)]
        self.has_moe_layers = bool(experts)
        self.num_experts = [p.num_experts for p in experts]

    def _validate_zero3_moe_compatibility(self) -> None:
        """Refuse nothing: expert parameters carry their placement, see `mark_experts`."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
        # bf16 with fp32 accumulation would get a class of its own at stage 1; one class serves every stage 1 and 2.
        super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION


def join_process_groups(mesh: ParallelMesh) -> None:
    """Let DeepSpeed use the process groups of the mesh. Collective: all ranks."""
    # Without this DeepSpeed builds an optional operator for CPU: a compiler and a minute that nothing here needs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    name = _group_name(mesh)
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.expert.group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = mesh.expert.ranks
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.expert_data.group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = mesh.expert_data.ranks


def leave_process_groups() -> None:
    """End all process groups, so that another run can begin in this process. Collective: all ranks."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # which lets go of DeepSpeed's own references too
    destroy_process_groups()


def mark_experts(model: nn.Module, mesh: ParallelMesh) -> None:
    """Mark expert parameters, so that DeepSpeed reduces and partitions them over the ranks that hold them."""
    for parameter in model.parameters():
        if isinstance(parameter, ExpertParameter):
            parameter.allreduce = False
            parameter.group_name = _group_name(mesh)
            parameter.ds_zero_placement_family = "autoep_expert"  # what ZeRO-3 asks for
            parameter.ds_zero_partition_group_name = parameter.group_name


def parameter_groups(model: Transformer, optim: OptimConfig, parts_matrices: bool = False) -> list[dict[str, Any]]:
    """Group the parameters by their optimizer rules, experts apart.

    Args:
        model: Model marked by `mark_experts`.
        optim: Optimizer settings, resolved: the weight decay, and the factor of the routers' learning rate.
        parts_matrices: Whether matrices have groups of their own.

    Returns:
        Groups as torch's optimizers take them, with "lr_factor": the learning rate of a group is that of the schedule
        times this factor; and "is_matrix": whether it has matrices alone, which are apart from the others.
    """
    rules, router_factor = optim_rules(model), optim.router_lr_factor
    assert router_factor != "auto", "the configuration is resolved"
    maps = {id(parameter) for router in model.routers for parameter in router.parameters()}
    by_rule: dict[OptimRule, list[nn.Parameter]] = {rule: [] for rule in _USUAL_RULES}
    for name, parameter in model.named_parameters():
        rule = replace(rules[name], matrices=int(parts_matrices and rules[name].matrices > 0))
        if id(parameter) in maps:
            rule = replace(rule, lr_factor=rule.lr_factor * router_factor)
        by_rule.setdefault(rule, []).append(parameter)
    wanted = [
        {
            "name": _name_of(rule),
            "params": parameters,
            "weight_decay": optim.weight_decay if rule.weight_decay else 0.0,
            "lr_factor": rule.lr_factor,
            "is_matrix": rule.matrices > 0,
        }
        for rule, parameters in by_rule.items()
    ]
    split = split_params_into_different_moe_groups_for_optimizer(wanted)
    return [group for group in split if group["params"]]


def _name_of(rule: OptimRule) -> str:
    if rule in _USUAL_RULES:
        return _USUAL_RULES[rule]
    name = f"lr x {rule.lr_factor:g}, {'decay' if rule.weight_decay else 'no decay'}"
    return f"{name}, matrices" if rule.matrices else name


def _group_name(mesh: ParallelMesh) -> str:
    return f"ep_size_{mesh.expert.size}"
