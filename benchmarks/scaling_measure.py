"""What benchmarks/scaling.py times: MoE layers and models of many sizes, in turn in every round.

All are built from a configuration, as the trainer's are, with initial weights; tokens are random, so that routing is
nearly uniform.
Legend: T tokens, D hidden_size, F intermediate_size, E experts, K top_k, L layers, B batch, S sequence, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.scaling_rows import Point, Timing
from moe_train.config.model import ModelConfig
from moe_train.model.block import Block
from moe_train.model.build import build_model
from moe_train.model.parameters import Constant, InitialValue, LogicalTensor, Normal, allocate
from moe_train.model.transformer import Tokens, Transformer
from moe_train.ops.cross_entropy import mean_cross_entropy

WARM_UP_ROUNDS = 1
# Of the model along L: every layer an MoE layer. The head's vocabulary is small, or it would outweigh a layer.
MODEL: dict[str, Any] = {"hidden_size": 256, "num_heads": 4, "moe_every": 1}
MODEL_EXPERT_WIDTH, MODEL_VOCAB, MODEL_SEQUENCE = 512, 1024, 512
_KEY_BITS = 62


@dataclass(frozen=True)
class Plan:
    """What all points share.

    Attributes:
        D: Width of a token's row of the MoE layer alone.
        F: Intermediate width of its experts.
        K: Experts of a token, everywhere.
        rounds: Timings of every point.
        seed: Of weights and tokens.
        dtype: Of weights and activations.
        device: To run on.
    """

    D: int
    F: int
    K: int
    rounds: int
    seed: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Subject:
    """Something to time.

    Attributes:
        forward: A forward pass; what it returns goes backward when called.
        tensors: All that takes a gradient.
    """

    forward: Callable[[], Callable[[], None]]
    tensors: list[Tensor]


def measure(points: Sequence[Point], plan: Plan) -> tuple[dict[Point, list[Timing]], dict[Point, int]]:
    """Every point in turn in every round, each round beginning with another one.

    Args:
        points: Of one axis: they are in memory together.
        plan: What they share.

    Returns:
        Timings of every round, and numbers of parameters.
    """
    modules: dict[tuple[int, int], nn.Module] = {}  # points that differ in T alone have the same
    subjects: dict[Point, Subject] = {}
    for point in points:
        if (point.E, point.L) not in modules:
            modules[point.E, point.L] = build_transformer(point, plan) if point.L else build_layer(point.E, plan)
        module = modules[point.E, point.L]
        subjects[point] = _model_subject(module, point, plan) if point.L else _layer_subject(module, point, plan)
    for _ in range(WARM_UP_ROUNDS):
        for subject in subjects.values():
            _take_time(subject, plan.device)
    found: dict[Point, list[Timing]] = {point: [] for point in points}
    for number in range(plan.rounds):
        first = number % len(points)
        for point in [*points[first:], *points[:first]]:
            found[point].append(_take_time(subjects[point], plan.device))
    return found, {point: _count(modules[point.E, point.L].parameters()) for point in points}


def build_layer(E: int, plan: Plan) -> nn.Module:
    """An MoE layer alone, as a model's first block has it."""
    shape = {"hidden_size": plan.D, "num_layers": 1, "num_heads": 1, "moe_every": 1}
    return cast("Block", _build(shape, E, plan.F, 1, plan).blocks[0]).feed_forward  # ModuleList does not tell


def build_transformer(point: Point, plan: Plan) -> Transformer:
    """A model of MODEL's widths."""
    return _build({**MODEL, "num_layers": point.L}, point.E, MODEL_EXPERT_WIDTH, MODEL_VOCAB, plan)


def _build(shape: dict[str, Any], E: int, F: int, vocab_size: int, plan: Plan) -> Transformer:
    moe = {"num_experts": E, "top_k": plan.K, "intermediate_size": F, "router": "softmax_topk"}
    config = ModelConfig.model_validate({**shape, "moe": moe})
    model = build_model(config, vocab_size, seed=plan.seed, measures=False)
    draws = torch.Generator(plan.device).manual_seed(plan.seed)

    def fill(data: Tensor, place: LogicalTensor, initial: InitialValue) -> None:
        # Not the trainer's keyed numbers, which take 20 times as long: nothing here depends on them.
        match initial:
            case Constant(value):
                data.fill_(value)
            case Normal(std):
                data.normal_(0.0, std, generator=draws)

    allocate(model, fill, dtype=plan.dtype, device=plan.device)
    return model.train()


def _layer_subject(layer: nn.Module, point: Point, plan: Plan) -> Subject:
    draws = torch.Generator(plan.device).manual_seed(plan.seed)
    shape = (1, point.T, plan.D)
    x_1TD, grad_1TD = (torch.randn(shape, generator=draws, device=plan.device).to(plan.dtype) for _ in range(2))
    keys_1T = torch.randint(2**_KEY_BITS, shape[:2], generator=draws, device=plan.device)
    x_1TD.requires_grad_()

    def forward() -> Callable[[], None]:
        y_1TD = layer(x_1TD, keys_1T)[0]
        return lambda: y_1TD.backward(grad_1TD)

    return Subject(forward, [x_1TD, *layer.parameters()])


def _model_subject(model: nn.Module, point: Point, plan: Plan) -> Subject:
    draws = torch.Generator(plan.device).manual_seed(plan.seed)
    shape = (point.T // MODEL_SEQUENCE, MODEL_SEQUENCE)
    ids_BS, targets_BS = (torch.randint(MODEL_VOCAB, shape, generator=draws, device=plan.device) for _ in range(2))
    tokens = Tokens(ids_BS, torch.arange(shape[0], device=plan.device))

    def forward() -> Callable[[], None]:
        logits_BSV = model(tokens).logits_BSV
        return mean_cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()).backward

    return Subject(forward, list(model.parameters()))


def _take_time(subject: Subject, device: torch.device) -> Timing:
    """Of one forward and backward pass, beginning without gradients."""
    _drop_gradients(subject)
    begin = _now(device)
    backward = subject.forward()
    between = _now(device)
    backward()
    end = _now(device)
    _drop_gradients(subject)
    return Timing(between - begin, end - begin)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _drop_gradients(subject: Subject) -> None:
    for tensor in subject.tensors:
        tensor.grad = None


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
