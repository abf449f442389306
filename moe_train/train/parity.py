"""Parity of layouts: layouts of ranks that must give the same numbers, and the comparison of their records."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.train.telemetry.records import Record

LOSS_TOLERANCE = 1e-4  # relative, at every step: fp32 sums in another order, grown by 20 steps of training
GRAD_NORM_TOLERANCE = 1e-3  # relative
NUM_STEPS = 20
_GLOBAL_BATCH = 16
_NODE_SIZE = 2  # ranks


@dataclass(frozen=True)
class Layout:
    """Layout of a run over ranks.

    Attributes:
        world_size: Number of ranks.
        expert_parallel_size: Number of ranks that share the experts.
        zero_stage: Stage of DeepSpeed ZeRO.
        accumulation: Number of micro-steps of a step, with the same global batch.
        balance: Whether the CV^2 terms are on. They depend on the tokens of a micro-step, so that layouts with
            different accumulation are compared without them.
        dispatch: Name of the dispatcher; two_level takes two ranks as a node.
        chunks: Number of chunks in which tokens travel.
    """

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    accumulation: int
    balance: bool
    dispatch: str = "flat"
    chunks: int = 1

    @property
    def name(self) -> str:
        """Name of the layout, for people."""
        terms = "with" if self.balance else "without"
        way = f", {self.dispatch} in {self.chunks}" if self.expert_parallel_size > 1 else ""
        return (
            f"{self.world_size} ranks, EP {self.expert_parallel_size}{way}, ZeRO {self.zero_stage}, "
            f"accumulation {self.accumulation}, {terms} CV^2"
        )

    def options(self) -> list[str]:
        """Return the training options of the layout."""
        coefficient = 0.1 if self.balance else 0.0
        micro = _GLOBAL_BATCH // (self.world_size * self.accumulation)
        return [
            f"--parallel.expert_parallel_size={self.expert_parallel_size}",
            f"--parallel.zero_stage={self.zero_stage}",
            f"--train.micro_batch_size={micro}",
            f"--train.global_batch_size={_GLOBAL_BATCH}",
            f"--model.moe.importance_cv2_coef={coefficient}",
            f"--model.moe.load_cv2_coef={coefficient}",
            f"--parallel.dispatch={self.dispatch}",
            f"--parallel.chunks={self.chunks}",
            *([f"--parallel.ranks_per_node={_NODE_SIZE}"] if self.dispatch == "two_level" else []),
        ]


# The first layout of each kind, with and without CV^2, is the reference of the others.
LAYOUTS = (
    Layout(1, 1, 1, 2, balance=True),
    Layout(2, 2, 1, 2, balance=True, dispatch="unique", chunks=3),
    Layout(2, 1, 2, 2, balance=True),
    Layout(4, 2, 3, 2, balance=True, chunks=2),
    Layout(4, 4, 1, 2, balance=True, dispatch="two_level", chunks=2),
    Layout(1, 1, 1, 1, balance=False),
    Layout(2, 2, 1, 2, balance=False),
    Layout(2, 1, 2, 4, balance=False),
    Layout(4, 2, 3, 1, balance=False, dispatch="unique"),
)


def choose_layouts(numbers: str | None) -> list[Layout]:
    """Choose layouts by their numbers, and add their references.

    Args:
        numbers: Numbers such as "1,3", counted from 0; None: all.

    Raises:
        UsageError: If one is not the number of a layout.
    """
    if numbers is None:
        return list(LAYOUTS)
    known = {str(number): layout for number, layout in enumerate(LAYOUTS)}
    for number in numbers.split(","):
        if number not in known:
            raise UsageError(f"--layouts ({numbers!r}): {number!r} is not a number from 0 to {len(LAYOUTS) - 1}")
    chosen = [known[number] for number in numbers.split(",")]
    references = [next(layout for layout in LAYOUTS if layout.balance == each.balance) for each in chosen]
    return [layout for layout in LAYOUTS if layout in chosen or layout in references]


# A small model with every part that a layout could disturb; more options may follow and override these.
OPTIONS = (
    "--model.hidden_size=64",
    "--model.num_layers=4",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.kv_layers=2",
    "--model.intermediate_size=128",
    "--model.moe.num_experts=8",
    "--model.moe.router=noisy_topk",
    "--data.source=python_stdlib",
    "--data.validation_fraction=0",
    "--optim.learning_rate=3e-3",
    "--optim.warmup_steps=5",
    "--optim.schedule=constant",
    "--train.sequence_length=64",
    "--train.precision=fp32",
    "--train.sample_tokens=0",
    f"--train.steps={NUM_STEPS}",
    # With seed 0 the gradient of step 20 is ill-conditioned: in one process, a learning rate that is 1e-7 larger
    # changes its norm by 1.9e-3. With seed 1 the change is 3e-7 at most, so that a difference of a layout is seen.
    "--train.seed=1",
    "--telemetry.tensorboard=false",
    "--telemetry.every=1",
)


@dataclass(frozen=True)
class Comparison:
    """Comparison of a layout's run with the reference.

    Attributes:
        layout: Layout of the run.
        loss_difference: Largest relative difference of train/loss over the steps.
        grad_norm_difference: Largest relative difference of train/grad_norm over the steps.
        steps: Number of compared steps.
    """

    layout: Layout
    loss_difference: float
    grad_norm_difference: float
    steps: int

    @property
    def passed(self) -> bool:
        """Whether both differences stay within their tolerances at every step of the run."""
        return (
            self.steps == NUM_STEPS
            and self.loss_difference <= LOSS_TOLERANCE
            and self.grad_norm_difference <= GRAD_NORM_TOLERANCE
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self.layout) | {
            "steps": self.steps,
            "loss_difference": self.loss_difference,
            "grad_norm_difference": self.grad_norm_difference,
            "passed": self.passed,
        }


def compare(layout: Layout, records: Sequence[Record], reference: Sequence[Record]) -> Comparison:
    """Compare a run with the reference, step by step.

    Args:
        layout: Layout of the run.
        records: Records of the run.
        reference: Records of the reference.
    """
    here, there = ({r["step"]: r for r in run if "train/loss" in r} for run in (records, reference))
    steps = sorted(here.keys() & there.keys())
    worst = {
        key: max((_relative(here[step][key], there[step][key]) for step in steps), default=math.inf)
        for key in ("train/loss", "train/grad_norm")
    }
    return Comparison(layout, worst["train/loss"], worst["train/grad_norm"], len(steps))


def _relative(value: float | None, expected: float | None) -> float:
    if value is None or expected is None:  # how a number that is not finite is written
        return math.inf
    difference = abs(value - expected) / abs(expected)
    return difference if math.isfinite(difference) else math.inf  # max() would pass over a NaN
