"""The squared-coefficient-of-variation balance terms.

Source: Shazeer et al. 2017, arXiv 1701.06538, equations 6-11; over the whole step: specification of this project, after
the argument of arXiv 2501.11873 for balance over the global batch.
Legend: L MoE layers, E experts.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from moe_train.config.moe import MoEConfig
from moe_train.distributed.collectives import all_reduce_sum
from moe_train.model.moe.balance.base import BalanceContext, BalanceKind
from moe_train.model.moe.steps import RoutingSums

Scope = Literal["step", "micro_step", "rank"]
_EPSILON = 1e-10


def cv_squared(values: Tensor) -> Tensor:
    """Population variance over squared mean of the last dimension: CV^2 = var(v) / (mean(v)^2 + 1e-10).

    Args:
        values: [..., E], non-negative; 0 for E = 1.

    Returns:
        [...].
    """
    return values.var(dim=-1, correction=0) / (values.mean(dim=-1) ** 2 + _EPSILON)


def cv_squared_slope(values: Tensor) -> Tensor:
    """Gradient of CV^2 = mean(v^2) / mean(v)^2 - 1: g_i = 2 / (E m^2) (v_i - mean(v^2) / m), with m^2 + 1e-10.

    sum_i g_i v_i = 0, for CV^2 does not change if all values do by one factor.

    Args:
        values: [..., E], non-negative; all zero gives zero.

    Returns:
        [..., E].
    """
    mean = values.mean(-1, keepdim=True)
    ratio = values.square().mean(-1, keepdim=True) / mean.where(mean > 0, 1.0)
    return 2 / (values.shape[-1] * (mean.square() + _EPSILON)) * (values - ratio)


@dataclass(frozen=True)
class SquaredVariation:
    """coef * CV^2 of one of the routing sums, over the tokens of a scope.

    With scope step, u being the sums of the last step per token, and g the slope of CV^2 at u, a part's loss is
    coef N / T sum_i g_i v_i: linear in its sums v, so that every split of the step into parts has the same gradient.

    Attributes:
        coef: Weight.
        name: importance, the sum of an expert's gates (equations 6-7); or load, the expected number of its tokens
            (equations 8-11).
        scope: Tokens that it is formed over. step: those of the optimizer step; micro_step: those of a micro-step of
            all ranks; rank: those of a rank's micro-batch. The last two depend on the split.
    """

    coef: float
    name: Literal["importance", "load"]
    scope: Scope = "step"

    def loss(self, sums: RoutingSums, context: BalanceContext) -> Tensor:
        """Compute this part's loss.

        Args:
            sums: [L, E] sums of this rank's micro-batch.
            context: Sizes of the step, and the sums of the last one.

        Returns:
            Scalar, added up over layers; for scope micro_step the same on all ranks.

        Collective: All ranks, for scope micro_step.
        """
        values_LE: Tensor = getattr(sums, self.name)
        if self.scope == "step":
            last_LE = getattr(context.last, f"{self.name}_LE").to(values_LE.dtype)
            parts_L = (cv_squared_slope(last_LE) * values_LE).sum(-1) * context.last.known_L
            return self.coef * context.size.num_parts / context.size.num_tokens * parts_L.sum()
        group = context.group if self.scope == "micro_step" else None
        return self.coef * cv_squared(all_reduce_sum(values_LE, group)).sum()

    def value_of_step(self, sums: RoutingSums) -> Tensor:
        return self.coef * cv_squared(getattr(sums, self.name)).sum()


def _kind(name: Literal["importance", "load"]) -> BalanceKind:
    def coef(moe: MoEConfig, section: Any) -> float:
        del section
        found: float = getattr(moe, f"{name}_cv2_coef")
        return found

    return BalanceKind(
        weight=coef,
        field=f"{name}_cv2_coef",
        term=lambda moe, section: SquaredVariation(coef(moe, section), name, moe.balance_scope),
        remembers=lambda moe, section: frozenset({name} if moe.balance_scope == "step" else ()),
        reduces=lambda moe, section: moe.balance_scope == "micro_step",
        split_setting=lambda moe, section: (
            None if moe.balance_scope == "step" else f"model.moe.balance_scope ({moe.balance_scope})"
        ),
    )


IMPORTANCE_CV2 = _kind("importance")
LOAD_CV2 = _kind("load")
