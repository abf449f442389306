"""Balance terms of the squared coefficient of variation.

Source: Shazeer et al. 2017, arXiv 1701.06538, equations 6-11.
Legend: L MoE layers, E experts.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_train.distributed.collectives import Group, all_reduce_sum
from moe_train.model.moe.balance.base import BalanceKind
from moe_train.model.moe.steps import RoutingSums


def cv_squared(values: Tensor) -> Tensor:
    """Compute CV^2 = var(v) / (mean(v)^2 + 1e-10) over the last dimension, with the population variance.

    Args:
        values: [..., E], non-negative.

    Returns:
        [...]; 0 for E = 1.
    """
    return values.var(dim=-1, correction=0) / (values.mean(dim=-1) ** 2 + 1e-10)


@dataclass(frozen=True)
class ImportanceCV2:
    """Loss term coef * CV^2(importance), importance_i = sum over tokens of the gates of expert i (equations 6-7).

    Attributes:
        coef: Weight of the term.
        is_global: Whether the ranks' sums are added before CV^2, which is not linear; False: each rank takes its own.
    """

    coef: float
    is_global: bool = True

    def loss(self, sums: RoutingSums, group: Group | None) -> Tensor:
        """Compute the term, added up over layers.

        Args:
            sums: [L, E] sums of this rank's micro-batch.
            group: Ranks whose sums are added before CV^2, if the term is global; None: this process alone.

        Returns:
            Scalar; if the term is global, the same on all ranks of the group, else this rank's part of a mean over
            ranks.

        Collective: All ranks of the group, if the term is global.
        """
        return self.coef * cv_squared(all_reduce_sum(sums.importance, group if self.is_global else None)).sum()


@dataclass(frozen=True)
class LoadCV2:
    """Loss term coef * CV^2(load), with the smooth load (equations 8-11).

    load_i = sum over tokens of the probability that expert i is chosen.

    Attributes:
        coef: Weight of the term.
        is_global: Whether the ranks' sums are added before CV^2, which is not linear; False: each rank takes its own.
    """

    coef: float
    is_global: bool = True

    def loss(self, sums: RoutingSums, group: Group | None) -> Tensor:
        """Compute the term, added up over layers; see `ImportanceCV2.loss` for arguments, result and Collective."""
        return self.coef * cv_squared(all_reduce_sum(sums.load, group if self.is_global else None)).sum()


IMPORTANCE_CV2 = BalanceKind(
    weight=lambda moe, section: moe.importance_cv2_coef,
    field="importance_cv2_coef",
    term=lambda moe, section: ImportanceCV2(moe.importance_cv2_coef, is_global=moe.balance_scope == "global"),
    reduces=lambda moe, section: moe.balance_scope == "global",
)
LOAD_CV2 = BalanceKind(
    weight=lambda moe, section: moe.load_cv2_coef,
    field="load_cv2_coef",
    term=lambda moe, section: LoadCV2(moe.load_cv2_coef, is_global=moe.balance_scope == "global"),
    reduces=lambda moe, section: moe.balance_scope == "global",
)
