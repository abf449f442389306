"""Plain top-k gating over a softmax.

Source: Jiang et al. 2024 (Mixtral), arXiv 2401.04088, section 2.1; without renormalisation Fedus et al. 2021 (Switch).
Legend: T tokens, D hidden_size, E experts, K top_k.
"""

from torch import Tensor

from moe_train.model.layers import WideLinear
from moe_train.model.moe.routers.base import Router, choose_experts, gates_of, sum_over_tokens
from moe_train.model.moe.steps import Routing


class SoftmaxTopKRouter(Router):
    """The K largest logits, gated by a softmax; load is the counts, which have no gradient."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, renormalize: bool, init_std: float) -> None:
        super().__init__()
        self.gate = WideLinear(hidden_size, num_experts, init_std)
        self.num_experts, self.top_k, self.renormalize = num_experts, top_k, renormalize

    def forward(self, x_TD: Tensor, token_keys_T: Tensor) -> Routing:
        logits_TE = self.gate(x_TD)
        experts_TK = choose_experts(logits_TE, token_keys_T, self.top_k)
        gates_TK = gates_of(logits_TE, experts_TK, self.renormalize)
        return Routing(gates_TK, experts_TK, logits_TE, sum_over_tokens(gates_TK, experts_TK, None, self.num_experts))
