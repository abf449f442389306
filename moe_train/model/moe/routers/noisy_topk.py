"""Noisy top-k gating with the smooth load estimate.

Source: Shazeer et al. 2017, arXiv 1701.06538, equations 3-5 and appendix A.
Legend: T tokens, D hidden_size, E experts, K top_k.
"""

import math

import torch
import torch.nn.functional as F
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
    expert_keys,
    gates_of,
)
from moe_train.ops.keyed_random import make_key, normal


class NoisyTopKRouter(Router):
    """A router that adds noise of a learned standard deviation to the logits in training; both maps start at zero."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        noise_epsilon: float,
        renormalize: bool,
        layer_key: int,
        options: RouterOptions = PLAIN,
    ) -> None:
        super().__init__(num_experts, top_k, options)
        self.gate = WideLinear(hidden_size, num_experts, init_std=0.0)
        self.noise = WideLinear(hidden_size, num_experts, init_std=0.0)
        self.renormalize, self.noise_epsilon, self.layer_key = renormalize, noise_epsilon, layer_key

    def choose(self, x_TD: Tensor, token_keys_T: Tensor) -> Choice:
        clean_TE = self.gate(x_TD)
        if not self.training:
            experts_TK = choose_experts(self.with_bias(clean_TE), token_keys_T, self.top_k)
            gates_TK = gates_of(clean_TE, experts_TK, self.renormalize)
            return Choice(clean_TE, clean_TE.softmax(1), experts_TK, gates_TK)
        sigma_TE = F.softplus(self.noise(x_TD)) + self.noise_epsilon
        draw_TE = normal(expert_keys(token_keys_T, self.layer_key, self.num_experts)).to(clean_TE.dtype)
        noisy_TE = clean_TE + draw_TE * sigma_TE
        experts_TK = self.with_bias(noisy_TE).topk(self.top_k, dim=1).indices
        gates_TK = gates_of(noisy_TE, experts_TK, self.renormalize)
        # The bias takes part in the choice, and so in the probability of being chosen.
        chosen_TE = probability_in_top_k(self.with_bias(clean_TE), self.with_bias(noisy_TE), sigma_TE, self.top_k)
        clean_TK = None
        if "agreement" in self.options.optional_sums:
            clean_TK = choose_experts(self.with_bias(clean_TE), token_keys_T, self.top_k)
        return Choice(clean_TE, clean_TE.softmax(1), experts_TK, gates_TK, chosen_TE.sum(0), clean_TK)


def probability_in_top_k(clean_TE: Tensor, noisy_TE: Tensor, sigma_TE: Tensor, top_k: int) -> Tensor:
    """Compute the probability that an expert is among the K best if only its own noise is drawn again (equations 8-9).

    P = Phi((clean - kth_excluding) / sigma), where kth_excluding is the K-th largest noisy logit of the other experts:
    the (K+1)-th largest of all for an expert among the K best, else the K-th largest.

    Args:
        clean_TE: Logits without noise.
        noisy_TE: Logits with noise.
        sigma_TE: Standard deviation of the noise, positive.
        top_k: K, experts per token.

    Returns:
        [T, E]; 1 everywhere if K = E, because there is no boundary.
    """
    if top_k == clean_TE.shape[1]:
        return torch.ones_like(clean_TE)
    best = noisy_TE.topk(top_k + 1, dim=1)
    boundary_in_T1 = best.values[:, top_k : top_k + 1]  # for an expert that is in: the first that is out
    boundary_out_T1 = best.values[:, top_k - 1 : top_k]  # for an expert that is out: the last that is in
    is_in_TE = torch.zeros_like(clean_TE, dtype=torch.bool).scatter(1, best.indices[:, :top_k], True)
    boundary_TE = torch.where(is_in_TE, boundary_in_T1, boundary_out_T1)
    return 0.5 * torch.erfc((boundary_TE - clean_TE) / (sigma_TE * math.sqrt(2.0)))


def _build(spec: RouterSpec) -> NoisyTopKRouter:
    moe, key = spec.model.moe, make_key(spec.seed, "router_noise", spec.layer)
    sizes = spec.model.hidden_size, moe.num_experts, moe.top_k
    return NoisyTopKRouter(*sizes, moe.noise_epsilon, moe.gates_sum_to_one, layer_key=key, options=spec.options)


NOISY_TOPK = RouterKind(
    _build, RouterCost(products=2, kept=9, forward=120, backward=40), has_smooth_load=True, has_noise=True
)
