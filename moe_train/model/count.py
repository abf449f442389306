"""Counting parameters without allocating them."""

from dataclasses import dataclass

from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model
from moe_train.model.parameters import logical_tensors


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: All of them.
        active: Those a token passes: top_k of num_experts in every MoE layer, everything else in full.
        experts: Those of all experts.
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
