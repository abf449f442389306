"""Interface of ways to balance experts: a loss on routing sums, or a rule that moves the routers' bias after a step."""

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
        """Compute the scalar for the training loss from [L, ...] sums; a global term adds them over the group first."""


class BiasRule(Protocol):
    """A rule that moves the selection bias, without a gradient."""

    def after_step(self, bias_LE: Tensor, counts_LE: Tensor, factor: float) -> Tensor:
        """Compute the next bias.

        Args:
            bias_LE: fp32, bias during the step.
            counts_LE: Assignments per expert over all ranks and micro-batches of the step.
            factor: Factor of the update rate at this step.
        """


@dataclass(frozen=True)
class Scheduled(Generic[Rule]):
    """A loss term or rule, and the schedule of its weight.

    Attributes:
        rule: Loss term or rule.
        points: Points (step, factor) of increasing steps; empty: the factor is always 1.
    """

    rule: Rule
    points: tuple[tuple[int, float], ...] = ()

    def factor(self, step: int) -> float:
        """Compute the factor of a step: linear between the points, constant before the first and after the last.

        Args:
            step: Optimizer step, from 0. The factor depends on it alone, so that resuming needs no state.
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
    """Description of a way to balance: a loss term, or a rule that moves the selection bias.

    The functions take the MoE section and its own section.

    Attributes:
        weight: Function that gives its weight; 0: it is off.
        term: Function that makes the loss term; None: it is a rule.
        rule: Function that makes the rule; None: it is a loss term.
        sums: Function that gives the optional routing sums that it needs, names of `routers.base.OPTIONAL_SUMS`.
        reduces: Function that tells whether it adds up sums over all ranks in every micro-batch.
        field: Field of model.moe that is its weight, and the name of its schedule; None: it has settings of its own,
            and its schedule has the name of the part.
        section: Class of its own settings, written under model.moe.balance.NAME; None: its settings are fields of
            model.moe.
    """

    weight: Callable[[MoEConfig, Any], float]
    term: Callable[[MoEConfig, Any], BalanceTerm] | None = None
    rule: Callable[[MoEConfig, Any], BiasRule] | None = None
    sums: Callable[[MoEConfig, Any], frozenset[str]] = lambda moe, section: frozenset()
    reduces: Callable[[MoEConfig, Any], bool] = lambda moe, section: False
    field: str | None = None
    section: type[Section] | None = None
