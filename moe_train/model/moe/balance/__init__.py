"""Ways to balance by the field of the configuration that weighs them: one file and one line here each."""

from collections.abc import Callable

from moe_train.config.moe import BalanceWeight, MoEConfig
from moe_train.model.moe.balance.base import BalanceTerm, BiasRule, Scheduled
from moe_train.model.moe.balance.cv_squared import ImportanceCV2, LoadCV2, cv_squared
from moe_train.model.moe.balance.loss_free_bias import LossFreeBias
from moe_train.model.moe.balance.switch_aux import SwitchAux
from moe_train.model.moe.balance.z_loss import ZLoss

BALANCE_TERMS: dict[BalanceWeight, Callable[[MoEConfig], BalanceTerm]] = {
    "importance_cv2_coef": lambda moe: ImportanceCV2(moe.importance_cv2_coef, is_global=moe.balance_scope == "global"),
    "load_cv2_coef": lambda moe: LoadCV2(moe.load_cv2_coef, is_global=moe.balance_scope == "global"),
    "switch_aux_coef": lambda moe: SwitchAux(moe.switch_aux_coef, moe.switch_scope),
    "z_loss_coef": lambda moe: ZLoss(moe.z_loss_coef),
}
BIAS_RULES: dict[BalanceWeight, Callable[[MoEConfig], BiasRule]] = {
    "bias_update_rate": lambda moe: LossFreeBias(moe.bias_update_rate),
}


def make_balance_terms(moe: MoEConfig) -> list[Scheduled[BalanceTerm]]:
    """The terms whose weight is not zero."""
    return [
        Scheduled(make(moe), moe.coef_schedules.get(name, ()))
        for name, make in BALANCE_TERMS.items()
        if getattr(moe, name) > 0
    ]


def make_bias_rule(moe: MoEConfig) -> Scheduled[BiasRule] | None:
    """The rule whose weight is not zero, or None."""
    for name, make in BIAS_RULES.items():
        if getattr(moe, name) > 0:
            return Scheduled(make(moe), moe.coef_schedules.get(name, ()))
    return None


__all__ = [
    "BALANCE_TERMS",
    "BIAS_RULES",
    "BalanceTerm",
    "BiasRule",
    "ImportanceCV2",
    "LoadCV2",
    "LossFreeBias",
    "Scheduled",
    "SwitchAux",
    "ZLoss",
    "cv_squared",
    "make_balance_terms",
    "make_bias_rule",
]
