"""Balance terms by their coefficient in the configuration: one file and one line here each."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from moe_train.config.model import MoEConfig
from moe_train.model.moe.balance.cv_squared import ImportanceCV2, LoadCV2, cv_squared
from moe_train.model.moe.steps import RoutingSums
from moe_train.parallel.collectives import Group


class BalanceTerm(Protocol):
    """A loss that makes experts share the tokens."""

    def loss(self, sums: RoutingSums, group: Group | None) -> Tensor:
        """Scalar, added to the training loss; from [L, E] sums, added up over the group first."""


BALANCE_TERMS: dict[str, Callable[[float], BalanceTerm]] = {
    "importance_cv2_coef": ImportanceCV2,
    "load_cv2_coef": LoadCV2,
}


def make_balance_terms(config: MoEConfig) -> list[BalanceTerm]:
    """The terms whose coefficient is not zero."""
    return [make(getattr(config, name)) for name, make in BALANCE_TERMS.items() if getattr(config, name) > 0]


__all__ = ["BALANCE_TERMS", "BalanceTerm", "ImportanceCV2", "LoadCV2", "cv_squared", "make_balance_terms"]
