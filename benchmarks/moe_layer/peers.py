"""Layers of the moe_layer benchmark: one MoE layer with the same weights in the form of each library.

Every layer routes by itself, with the same router weights: its input's first feature is 1, so that the first column of
the router is a bias, which is 0 (balanced) or the log of a Zipf law.
Legend: T tokens, D hidden_size, F intermediate_size, G = 2F, E experts, K top_k, N rows.
"""

import contextlib
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.moe_layer.rows import BOUND, CAPACITY_FACTOR, LAYERS, OURS, Case, Shape
from benchmarks.runner.layer import apply_layer, build_layer, draw_keys
from moe_train.model.parameters import materialize
from moe_train.ops.swiglu import swiglu

with contextlib.redirect_stdout(sys.stderr):  # it binds the stream of its messages when it is imported
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.layer import MoE
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

try:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
except ImportError:
    MixtralConfig = MixtralSparseMoeBlock = None


@dataclass(frozen=True)
class Weights:
    """Weights of one MoE layer.

    Attributes:
        router_ED: Rows of the linear map to logits.
        gate_up_EDG: w_gate, then w_up.
        down_EFD: w_down.
    """

    router_ED: Tensor
    gate_up_EDG: Tensor
    down_EFD: Tensor


@dataclass(frozen=True)
class Problem:
    """One case with its numbers.

    Attributes:
        case: Shape and routing.
        x_TD: Token rows, whose first feature is 1.
        grad_TD: Gradient of the output.
        weights: Weights of every layer.
        keys_T: int64, random key of each token.
    """

    case: Case
    x_TD: Tensor
    grad_TD: Tensor
    weights: Weights
    keys_T: Tensor


@dataclass(frozen=True)
class Layer:
    """One layer, ready to run.

    Attributes:
        run: Function from its input to its output.
        x_ND: Input, which takes a gradient.
        grad_ND: Gradient of the output.
        parameters: All parameters.
        gradients: Gradients of the weights, in the form of Weights; None: they have no such form.
    """

    run: Callable[[Tensor], Tensor]
    x_ND: Tensor
    grad_ND: Tensor
    parameters: list[Tensor]
    gradients: Callable[[], Weights] | None = None


def make_problem(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Draw the numbers of a case: unit-normal logits, with the log of a Zipf law where the routing is skewed."""
    shape = case.shape
    draws = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draws, device=device)

    x_TD, router_ED = normal(shape.T, shape.D), normal(shape.E, shape.D) / math.sqrt(shape.D - 1)
    x_TD[:, 0] = 1.0
    ranks_E = torch.arange(1, shape.E + 1, device=device)
    router_ED[:, 0] = -ranks_E.log() if case.routing == "zipf" else 0.0
    gate_up_EDG = torch.empty(shape.E, shape.D, 2 * shape.F, dtype=dtype, device=device)
    down_EFD = torch.empty(shape.E, shape.F, shape.D, dtype=dtype, device=device)
    for expert in range(shape.E):  # one after the other: no fp32 copy of all
        gate_up_EDG[expert] = normal(shape.D, 2 * shape.F) / math.sqrt(shape.D)
        down_EFD[expert] = normal(shape.F, shape.D) / math.sqrt(shape.F)
    keys_T = draw_keys(shape.T, draws)
    weights = Weights(router_ED.to(dtype), gate_up_EDG, down_EFD)
    return Problem(case, x_TD.to(dtype), normal(shape.T, shape.D).to(dtype), weights, keys_T)


def counts_of(problem: Problem) -> list[int]:
    """Number of assignments of every expert."""
    logits_TE = problem.x_TD.float() @ problem.weights.router_ED.float().t()
    experts_TK = logits_TE.topk(problem.case.shape.K, dim=1).indices
    return experts_TK.flatten().bincount(minlength=problem.case.shape.E).tolist()


def available_layers() -> list[str]:
    """Names of all layers but those whose library is not installed."""
    return [name for name in LAYERS if MixtralConfig is not None or not name.startswith("hf_")]


def make_layer(name: str, problem: Problem) -> Layer:
    """Make a layer by its name, with a copy of the problem's weights."""
    if name == BOUND:
        return _dense_bound(problem)
    build = {
        OURS: _moe_train,
        "deepspeed_autoep": _deepspeed_autoep,
        "deepspeed_dropless": lambda problem: _deepspeed_moe(problem, drop_tokens=False),
        "deepspeed_capacity": lambda problem: _deepspeed_moe(problem, drop_tokens=True),
        "hf_eager": lambda problem: _hf_mixtral(problem, "eager"),
        "hf_grouped_mm": lambda problem: _hf_mixtral(problem, "grouped_mm"),
    }[name]
    return build(problem)


def _layer(problem: Problem, module: nn.Module, run: Callable[[Tensor], Tensor], gradients: Callable) -> Layer:
    module.train()
    x_TD = problem.x_TD.clone().requires_grad_()
    return Layer(run, x_TD, problem.grad_TD, list(module.parameters()), gradients)


def _dense_bound(problem: Problem) -> Layer:
    """A dense SwiGLU with the layer's FLOPs: T*K rows through one expert."""
    copies, weights = problem.case.shape.K, problem.weights
    gate_up_DG = weights.gate_up_EDG[0].clone().requires_grad_()
    down_FD = weights.down_EFD[0].clone().requires_grad_()
    x_ND = problem.x_TD.repeat(copies, 1).requires_grad_()  # (T, D) -> (T*K, D)
    return Layer(
        lambda x_ND: swiglu(x_ND @ gate_up_DG) @ down_FD, x_ND, problem.grad_TD.repeat(copies, 1), [gate_up_DG, down_FD]
    )


def _moe_train(problem: Problem) -> Layer:
    shape, weights = problem.case.shape, problem.weights
    layer = build_layer(shape.D, shape.F, shape.E, shape.K)
    materialize(layer, seed=0, dtype=problem.x_TD.dtype, device=problem.x_TD.device)
    router, experts = layer.router.gate.weight, layer.experts
    _fill({router: weights.router_ED, experts.gate_up: weights.gate_up_EDG, experts.down: weights.down_EFD})
    return _layer(
        problem,
        layer,
        lambda x_TD: apply_layer(layer, x_TD, problem.keys_T),
        lambda: Weights(router.grad, experts.gate_up.grad, experts.down.grad),
    )


class _FusedExperts(nn.Module):
    """Expert weights as Mixtral's modules hold them, for AutoEP to take them from."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(weights.gate_up_EDG.transpose(1, 2).contiguous())
        self.down_proj = nn.Parameter(weights.down_EFD.transpose(1, 2).contiguous())


def _deepspeed_autoep(problem: Problem) -> Layer:
    """DeepSpeed's replacement of a Mixtral block, as its preset for Mixtral describes it."""
    shape, weights = problem.case.shape, problem.weights
    source = nn.Module()
    source.gate = nn.Linear(1, 1, bias=False)
    source.gate.weight = nn.Parameter(weights.router_ED.clone())
    source.experts = _FusedExperts(weights)
    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.E,
        top_k=shape.K,
        hidden_size=shape.D,
        ffn_hidden_size=shape.F,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    layer = AutoEPMoELayer(spec, source, ep_size=1, ep_rank=0, config=AutoEPConfig(load_balance_coeff=None))
    layer.to(problem.x_TD.device)
    router, experts = layer.router.gate.weight, layer.experts

    def gradients() -> Weights:
        gate_up_EGD = torch.cat((experts.w1.grad, experts.w3.grad), 1)
        return Weights(router.grad, gate_up_EGD.transpose(1, 2), experts.w2.grad.transpose(1, 2))

    return _layer(problem, layer, lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0), gradients)


class _Expert(nn.Module):
    """A SwiGLU of two linear maps."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def _deepspeed_moe(problem: Problem, drop_tokens: bool) -> Layer:
    shape, weights = problem.case.shape, problem.weights
    with torch.device(problem.x_TD.device):
        layer = MoE(
            shape.D,
            _Expert(shape.D, shape.F),
            num_experts=shape.E,
            k=shape.K,
            capacity_factor=CAPACITY_FACTOR if drop_tokens else 1.0,
            drop_tokens=drop_tokens,
            use_rts=False,
            top2_2nd_expert_sampling=False,  # the second best expert, as with every other layer
        )
    layer.to(problem.x_TD.device, problem.x_TD.dtype)
    router = layer.deepspeed_moe.gate.wg.weight
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    _fill({router: weights.router_ED})
    for expert, gate_up_DG, down_FD in zip(experts, weights.gate_up_EDG, weights.down_EFD, strict=True):
        _fill({expert.gate_up.weight: gate_up_DG.t(), expert.down.weight: down_FD.t()})

    def gradients() -> Weights:
        gate_up_EDG = torch.stack([_gradient(expert.gate_up.weight).t() for expert in experts])
        return Weights(router.grad, gate_up_EDG, torch.stack([_gradient(expert.down.weight).t() for expert in experts]))

    return _layer(problem, layer, lambda x_TD: layer(x_TD)[0], gradients)


def _hf_mixtral(problem: Problem, implementation: str) -> Layer:
    shape, weights = problem.case.shape, problem.weights
    config = MixtralConfig(
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_local_experts=shape.E,
        num_experts_per_tok=shape.K,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    config._experts_implementation = implementation
    with torch.device(problem.x_TD.device):
        layer = MixtralSparseMoeBlock(config).to(problem.x_TD.dtype)
    router, experts = layer.gate.weight, layer.experts
    gate_up, down = experts.gate_up_proj, experts.down_proj
    _fill(
        {
            router: weights.router_ED,
            gate_up: weights.gate_up_EDG.transpose(1, 2),
            down: weights.down_EFD.transpose(1, 2),
        }
    )
    return _layer(
        problem,
        layer,
        lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0),
        lambda: Weights(router.grad, gate_up.grad.transpose(1, 2), down.grad.transpose(1, 2)),
    )


@torch.no_grad()
def _fill(values: dict[Tensor, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.copy_(value)


def _gradient(parameter: Tensor) -> Tensor:
    # An expert that no token chose may have none.
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def check_shapes() -> tuple[Shape, ...]:
    """Small shapes in which deepspeed_capacity has room for every assignment: K > 2 takes another way through it."""
    return Shape(96, 32, 48, 4, 2), Shape(96, 32, 48, 8, 4)
