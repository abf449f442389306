"""What a way to balance experts is: a loss on the routing sums, or a rule that moves the routers' bias after a step."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from moe_train.config.base import Section
from moe_train.config.moe import MoEConfig
from moe_train.distributed.collectives import Group
from moe_train.model.moe.routers.last_step import LastStep
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.step_size import StepSize

Rule = TypeVar("Rule")


@dataclass(frozen=True)
class BalanceContext:
    """What a balance loss knows beside the sums of its part.

    Attributes:
        size: Sizes of the step.
        last: Sums of the last step that was taken, over all ranks.
        group: All ranks; None: this process is alone.
    """

    size: StepSize
    last: LastStep
    group: Group | None = None


class BalanceTerm(Protocol):
    """A loss that makes experts share the tokens."""

    def loss(self, sums: RoutingSums, context: BalanceContext) -> Tensor:
        """Compute this part's loss, of which the engine takes the mean over all parts.

        Args:
            sums: [L, ...] sums of this rank's micro-batch.
            context: Sizes of the step, and the sums of the last one.

        Returns:
            Scalar, added up over layers.
        """


class StepBalanceTerm(BalanceTerm, Protocol):
    """A loss over the whole step: `loss` gives its gradient, and `value_of_step` the value that is reported."""

    def value_of_step(self, sums: RoutingSums) -> Tensor:
        """Compute the term's value over the whole step.

        Args:
            sums: [L, ...] importance, load, probability and counts over all ranks and micro-batches of the step.

        Returns:
            Scalar, added up over layers.
        """


class BiasRule(Protocol):
    """A way to move the selection bias, outside of the gradient."""

    def after_step(self, bias_LE: Tensor, counts_LE: Tensor, factor: float) -> Tensor:
        """Compute the next bias.

        Args:
            bias_LE: fp32, as it was in the step.
            counts_LE: Assignments per expert over all ranks and micro-batches of the step.
            factor: Factor of the update rate at this step.
        """


@dataclass(frozen=True)
class Scheduled(Generic[Rule]):
    """A term or rule, and the factor of its weight over the run.

    Attributes:
        rule: The term or rule.
        points: (step, factor) of increasing steps; empty: 1 throughout.
        is_of_step: Whether it is a `StepBalanceTerm`.
    """

    rule: Rule
    points: tuple[tuple[int, float], ...] = ()
    is_of_step: bool = False

    def factor(self, step: int) -> float:
        """Interpolate linearly between the points; constant before the first and after the last.

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
    """Description of a way to balance: a loss term, or a rule that moves the selection bias.

    The functions take the MoE section and its own section.

    Attributes:
        weight: Function that gives its weight; 0: it is off.
        term: Function that makes the loss term; None: it is a rule.
        rule: Function that makes the rule; None: it is a loss term.
        sums: Function that gives the optional routing sums that it needs, names of `routers.base.OPTIONAL_SUMS`.
        remembers: Function that gives the sums of the last step that its loss needs: importance, load or share
            (`LastStep`). If there are any, its term is a `StepBalanceTerm`.
        reduces: Function that tells whether it adds up sums over all ranks in every micro-batch.
        split_setting: Function that names the setting, with its value, that makes the loss depend on how a step is
            split into micro-batches; None: no split changes it.
        field: Field of model.moe that is its weight, and the name of its schedule; None: it has settings of its own,
            and its schedule has the name of the part.
        section: Class of its own settings, written under model.moe.balance.NAME; None: its settings are fields of
            model.moe.
    """

    weight: Callable[[MoEConfig, Any], float]
    term: Callable[[MoEConfig, Any], BalanceTerm] | None = None
    rule: Callable[[MoEConfig, Any], BiasRule] | None = None
    sums: Callable[[MoEConfig, Any], frozenset[str]] = lambda moe, section: frozenset()
    remembers: Callable[[MoEConfig, Any], frozenset[str]] = lambda moe, section: frozenset()
    reduces: Callable[[MoEConfig, Any], bool] = lambda moe, section: False
    split_setting: Callable[[MoEConfig, Any], str | None] = lambda moe, section: None
    field: str | None = None
    section: type[Section] | None = None
