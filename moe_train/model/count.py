"""Count of a model's parameters, without memory for them."""

from dataclasses import dataclass

from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model
from moe_train.model.parameters import logical_tensors


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of a model.

    Attributes:
        total: All parameters.
        active: Parameters that a token passes: top_k of num_experts in every MoE layer, everything else in full.
        experts: Parameters of all experts.
    """

    total: int
    active: int
    experts: int


def count_parameters(config: ModelConfig, vocab_size: int) -> ParameterCount:
    """Count the parameters of a model built on the meta device."""
    tensors = logical_tensors(build_model(config, vocab_size)).values()
    total = sum(tensor.global_numel for tensor in tensors)
    experts = sum(tensor.global_numel for tensor in tensors if tensor.is_expert)
    active_experts = experts // config.moe.num_experts * config.moe.top_k
    return ParameterCount(total, total - experts + active_experts, experts)
