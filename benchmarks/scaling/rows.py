"""Rows of the scaling benchmark: what is timed along each axis, how time grows, and what that shows.

All layers and models are built from a configuration, as the trainer's are, with initial weights; tokens are random, so
that routing is nearly uniform.
Legend: T tokens of a micro-batch, D hidden_size, F intermediate_size, E experts, K top_k, L layers, B batch,
S sequence, V vocabulary.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runner.layer import apply_layer, build_layer, draw_keys
from benchmarks.runner.rounds import median_ratio, run_rounds
from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model
from moe_train.model.moe.layer import MoELayer
from moe_train.model.parameters import Constant, InitialValue, LogicalTensor, Normal, allocate
from moe_train.model.transformer import Tokens
from moe_train.ops.cross_entropy import mean_cross_entropy

AXES = {"experts": "E", "tokens": "T", "layers": "L"}
FEW_EXPERTS, MANY_EXPERTS = 8, 64
MOST_GROWTH = 0.15  # of the layer's time from few to many experts
MOST_SLOPE = 1.05  # in T and in L: proportional, plus noise
WARM_UP_ROUNDS = 1
# The model along L: every layer is an MoE layer. The head's vocabulary is small, or it would outweigh a layer.
MODEL: dict[str, Any] = {"hidden_size": 256, "num_heads": 4, "moe_every": 1}
MODEL_EXPERT_WIDTH, MODEL_VOCAB, MODEL_SEQUENCE = 512, 1024, 512


@dataclass(frozen=True)
class Point:
    """One thing that is timed.

    Attributes:
        axis: One of AXES.
        T: Tokens.
        E: Experts of a layer.
        L: Number of layers; 0: the MoE layer alone, without a model around it.
    """

    axis: str
    T: int
    E: int
    L: int

    @property
    def size(self) -> int:
        """Value that changes along the axis."""
        return getattr(self, AXES[self.axis])

    @property
    def series(self) -> tuple[str, int]:
        """Key of what it is compared with: axis, and T where several are measured along it."""
        return self.axis, self.T if self.axis == "experts" else 0


@dataclass(frozen=True)
class Timing:
    """One forward and backward pass.

    Attributes:
        forward: Seconds of the forward pass.
        both: Seconds of both passes.
    """

    forward: float
    both: float


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        axis: experts, tokens or layers.
        size: Size along the axis.
        tokens: T, tokens of a micro-batch.
        experts: E, experts of a layer.
        layers: L, number of layers; 0: the MoE layer alone.
        parameters: Number of parameters of what was timed.
        forward_ms: Median over rounds of the forward pass.
        ms: Median over rounds of both passes.
        ratio: Median over rounds of the time divided by that of the smallest size.
    """

    axis: str
    size: int
    tokens: int
    experts: int
    layers: int
    parameters: int
    forward_ms: float
    ms: float
    ratio: float


@dataclass(frozen=True)
class Series:
    """Rows along one axis, the smallest size first.

    Attributes:
        axis: experts, tokens or layers.
        tokens: T, tokens of a micro-batch; None: it changes along the axis.
        slope: Exponent of the power law that fits the times best: 0 is no growth, 1 proportional growth.
        rows: Rows of the table.
    """

    axis: str
    tokens: int | None
    slope: float
    rows: tuple[RowResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the rows."""
        return {"axis": self.axis, "tokens": self.tokens, "slope": self.slope}


@dataclass(frozen=True)
class Plan:
    """What all points share.

    Attributes:
        D: Width of a token's row, for the MoE layer alone.
        F: Intermediate width of its experts.
        K: Experts of a token, everywhere.
        rounds: Timings of every point.
        seed: Seed of weights and tokens.
        dtype: dtype of weights and activations.
        device: Device to run on.
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
        forward: Forward pass; it returns the backward pass, as a function.
        tensors: Everything that takes a gradient.
    """

    forward: Callable[[], Callable[[], None]]
    tensors: list[Tensor]


def measure(points: Sequence[Point], plan: Plan) -> tuple[dict[Point, list[Timing]], dict[Point, int]]:
    """Time every point, the points in turn in every round.

    Args:
        points: Points of one axis: they are in memory together.
        plan: What they share.

    Returns:
        Timings of every round, and numbers of parameters.
    """
    modules: dict[tuple[int, int], nn.Module] = {}  # points that differ in T alone have the same
    subjects: dict[Point, Subject] = {}
    for point in points:
        if (point.E, point.L) not in modules:
            modules[point.E, point.L] = build_module(point, plan)
        module = modules[point.E, point.L]
        subjects[point] = _model_subject(module, point, plan) if point.L else _layer_subject(module, point, plan)
    found = run_rounds(
        points, plan.rounds, lambda point, _: _take_time(subjects[point], plan.device), warm_ups=WARM_UP_ROUNDS
    )
    return found, {point: _count(modules[point.E, point.L].parameters()) for point in points}


def build_module(point: Point, plan: Plan) -> nn.Module:
    """Build what a point times: an MoE layer alone, or a model of MODEL's widths."""
    module: nn.Module
    if point.L:
        moe = {"num_experts": point.E, "top_k": plan.K, "intermediate_size": MODEL_EXPERT_WIDTH}
        config = {**MODEL, "num_layers": point.L, "moe": {**moe, "router": "softmax_topk"}}
        module = build_model(ModelConfig.model_validate(config), MODEL_VOCAB, seed=plan.seed, measures=False)
    else:
        module = build_layer(plan.D, plan.F, point.E, plan.K)
    draws = torch.Generator(plan.device).manual_seed(plan.seed)

    def fill(data: Tensor, place: LogicalTensor, initial: InitialValue) -> None:
        # Not the trainer's keyed numbers, which take 20 times as long: nothing here depends on them.
        match initial:
            case Constant(value):
                data.fill_(value)
            case Normal(std):
                data.normal_(0.0, std, generator=draws)

    allocate(module, fill, dtype=plan.dtype, device=plan.device)
    return module.train()


def _layer_subject(layer: MoELayer, point: Point, plan: Plan) -> Subject:
    draws = torch.Generator(plan.device).manual_seed(plan.seed)
    x_TD, grad_TD = (torch.randn(point.T, plan.D, generator=draws, device=plan.device).to(plan.dtype) for _ in range(2))
    keys_T = draw_keys(point.T, draws)
    x_TD.requires_grad_()

    def forward() -> Callable[[], None]:
        y_TD = apply_layer(layer, x_TD, keys_T)
        return lambda: y_TD.backward(grad_TD)

    return Subject(forward, [x_TD, *layer.parameters()])


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
    """Time one forward and backward pass, beginning without gradients."""
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


def series_of(timings: dict[Point, list[Timing]], parameters: dict[Point, int]) -> list[Series]:
    """Series of what was timed, by axis, in the order of `timings`.

    Args:
        timings: Timings of every round; the rounds of all points of an axis are the same.
        parameters: Number of parameters of every point.
    """
    found = []
    for key in dict.fromkeys(point.series for point in timings):
        points = sorted((point for point in timings if point.series == key), key=lambda point: point.size)
        first = [timing.both for timing in timings[points[0]]]
        rows = tuple(_row(point, timings[point], parameters[point], first) for point in points)
        tokens = None if key[0] == "tokens" else rows[0].tokens
        found.append(Series(key[0], tokens, slope([r.size for r in rows], [r.ms for r in rows]), rows))
    return found


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of the straight line that fits the logarithms best, by least squares; two or more sizes."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in times]).slope


def claims_of(found: Sequence[Series]) -> list[dict[str, Any]]:
    """What the measurement is to show, and whether this run of it does; nothing of what was not measured.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    claims = _growth_claims([each for each in found if each.axis == "experts" and growth(each) is not None])
    words = {"tokens": "The layer's time grows no faster than T", "layers": "The model's time grows no faster than L"}
    claims += [
        {
            "claim": f"{words[series.axis]}: as {AXES[series.axis]}^{series.slope:.2f} from {series.rows[0].size:,} to "
            f"{series.rows[-1].size:,}.",
            "holds": series.slope <= MOST_SLOPE,
        }
        for series in found
        if series.axis in words
    ]
    return claims


def growth(series: Series) -> float | None:
    """Growth of the time from few to many experts, as a share; None: one of the two was not measured."""
    ratios = {row.size: row.ratio for row in series.rows}
    if FEW_EXPERTS not in ratios or MANY_EXPERTS not in ratios:
        return None
    return ratios[MANY_EXPERTS] / ratios[FEW_EXPERTS] - 1


def _growth_claims(by_experts: Sequence[Series]) -> list[dict[str, Any]]:
    """Claims about experts, one for each size of a micro-batch."""
    claims = []
    for tokens, grown in sorted((series.tokens or 0, growth(series) or 0.0) for series in by_experts):
        words = f"From {FEW_EXPERTS} to {MANY_EXPERTS} experts at fixed K the layer's time grows by at most"
        figures = f"{MOST_GROWTH:.0%} with {tokens:,} tokens a micro-batch: {grown:.1%}"
        claims.append({"claim": f"{words} {figures}.", "holds": grown <= MOST_GROWTH})
    return claims


def _row(point: Point, timings: Sequence[Timing], parameters: int, first: Sequence[float]) -> RowResult:
    return RowResult(
        axis=point.axis,
        size=point.size,
        tokens=point.T,
        experts=point.E,
        layers=point.L,
        parameters=parameters,
        forward_ms=statistics.median(timing.forward for timing in timings) * 1e3,
        ms=statistics.median(timing.both for timing in timings) * 1e3,
        ratio=median_ratio([timing.both for timing in timings], first),
    )
