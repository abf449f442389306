"""What a way to balance experts is: a loss on the routing sums, or a rule that moves the routers' bias after a step."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from moe_train.config.base import Section
from moe_train.config.moe import MoEConfig
from moe_train.distributed.collectives import Group
from moe_train.model.moe.steps import RoutingSums

Rule = TypeVar("Rule")


class BalanceTerm(Protocol):
    """A loss that makes experts share the tokens."""

    def loss(self, sums: RoutingSums, group: Group | None) -> Tensor:
        """Scalar, added to the training loss; from [L, ...] sums, added up over the group first where it says so."""


class BiasRule(Protocol):
    """A way to move the selection bias, outside of the gradient."""

    def after_step(self, bias_LE: Tensor, counts_LE: Tensor, factor: float) -> Tensor:
        """The next bias.

        Args:
            bias_LE: fp32, as it was in the step.
            counts_LE: Assignments an expert over all ranks and micro-batches of the step.
            factor: Of the update rate at this step.
        """


@dataclass(frozen=True)
class Scheduled(Generic[Rule]):
    """A term or rule, and the factor of its weight over the run.

    Attributes:
        rule: What is weighed.
        points: (step, factor) of increasing steps; empty: 1 throughout.
    """

    rule: Rule
    points: tuple[tuple[int, float], ...] = ()

    def factor(self, step: int) -> float:
        """Linear between the points, constant before the first and after the last.

        Args:
            step: Optimizer step, from 0: a function of it alone, so that resuming needs no state.
        """
        if not self.points:
            return 1.0
        after = bisect_right([point for point, _ in self.points], step)
        if after == 0 or after == len(self.points):
            return self.points[min(after, len(self.points) - 1)][1]
        (start, low), (end, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (step - start) / (end - start)


@dataclass(frozen=True)
class BalanceKind:
    """A way to balance, described by itself: a loss term, or a rule that moves the selection bias.

    Attributes:
        weight: What weighs it, 0: it is off; from the MoE section and the kind's own section.
        field: Name of the weight in the configuration, under which its schedule stands.
        term: Makes the loss term; None: it is a rule.
        rule: Makes the rule; None: it is a loss term.
        sums: Names of the optional routing sums that it needs (`routers.base.OPTIONAL_SUMS`).
        reduces: Whether it adds up sums over all ranks in every micro-batch.
        section: Settings of its own, written under model.moe.balance.NAME; None: its settings are fields of model.moe.
    """

    weight: Callable[[MoEConfig, Any], float]
    field: str
    term: Callable[[MoEConfig, Any], BalanceTerm] | None = None
    rule: Callable[[MoEConfig, Any], BiasRule] | None = None
    sums: Callable[[MoEConfig, Any], frozenset[str]] = lambda moe, section: frozenset()
    reduces: Callable[[MoEConfig, Any], bool] = lambda moe, section: False
    section: type[Section] | None = None
