"""Plain top-k gating over a softmax.

Source: Jiang et al. 2024 (Mixtral), arXiv 2401.04088, section 2.1; with K = 1 and without renormalisation Fedus et al.
2021 (Switch), arXiv 2101.03961.
Legend: T tokens, D hidden_size, E experts, K top_k.
"""

from torch import Tensor

from moe_train.model.cost import RouterCost
from moe_train.model.layers import WideLinear
from moe_train.model.moe.routers.base import (
    PLAIN,
    Choice,
    Router,
    RouterKind,
    RouterOptions,
    RouterSpec,
    choose_experts,
    gates_of,
)


class SoftmaxTopKRouter(Router):
    """A router that chooses the K largest probabilities; its load is the counts, which have no gradient."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        init_std: float,
        options: RouterOptions = PLAIN,
    ) -> None:
        super().__init__(num_experts, top_k, options)
        self.gate = WideLinear(hidden_size, num_experts, init_std)
        self.renormalize = renormalize

    def choose(self, x_TD: Tensor, token_keys_T: Tensor) -> Choice:
        logits_TE = self.gate(x_TD)
        probability_TE = logits_TE.softmax(1)
        # Without a bias the logits decide: in fp32 distinct logits can have equal probabilities.
        scores_TE = logits_TE if self.selection_bias is None else self.with_bias(probability_TE)
        experts_TK = choose_experts(scores_TE, token_keys_T, self.top_k)
        return Choice(logits_TE, probability_TE, experts_TK, gates_of(logits_TE, experts_TK, self.renormalize))


def _build(spec: RouterSpec) -> SoftmaxTopKRouter:
    moe = spec.model.moe
    sizes = spec.model.hidden_size, moe.num_experts, moe.top_k
    return SoftmaxTopKRouter(*sizes, moe.gates_sum_to_one, spec.model.init_std, spec.options)


SOFTMAX_TOPK = RouterKind(_build, RouterCost(products=1, kept=4, forward=50, backward=20))
