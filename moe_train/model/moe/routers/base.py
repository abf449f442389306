"""The router's interface, and the parts all routers share.

Legend: T tokens, D hidden_size, E experts, K top_k.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moe_train.model.moe.steps import Routing, RoutingSums
from moe_train.ops.keyed_random import combine, make_key

_TIE_KEY = make_key("router_tie_break")


class Router(nn.Module, ABC):
    """Chooses K experts for every token."""

    @abstractmethod
    def forward(self, x_TD: Tensor, token_keys_T: Tensor) -> Routing:
        """Route tokens.

        Args:
            x_TD: Token rows.
            token_keys_T: int64 random key of each token, the same on any layout.
        """


def choose_experts(scores_TE: Tensor, token_keys_T: Tensor, top_k: int) -> Tensor:
    """The K best experts of every token, best first; equal scores are ordered by a keyed draw, not by expert number.

    Without that, the zero logits of an untrained router would send every token to the first experts.

    Args:
        scores_TE: What decides.
        token_keys_T: int64 random key of each token.
        top_k: K.

    Returns:
        int64 [T, K].
    """
    shuffle_TE = expert_keys(token_keys_T, _TIE_KEY, scores_TE.shape[1]).argsort(dim=1)
    # A stable sort of the shuffled scores: the draw decides between equal scores and nothing else.
    ranked_TE = scores_TE.detach().gather(1, shuffle_TE).argsort(dim=1, descending=True, stable=True)
    return shuffle_TE.gather(1, ranked_TE[:, :top_k])


def gates_of(logits_TE: Tensor, experts_TK: Tensor, renormalize: bool) -> Tensor:
    """Gates of the chosen experts: softmax over them, or their softmax probability among all. [T, K]."""
    if renormalize:
        return logits_TE.gather(1, experts_TK).softmax(1)
    return logits_TE.softmax(1).gather(1, experts_TK)


def expert_keys(token_keys_T: Tensor, layer_key: int, num_experts: int) -> Tensor:
    """A random key for every token and expert of a layer. int64 [T, E]."""
    experts_E = torch.arange(num_experts, dtype=torch.int64, device=token_keys_T.device)
    return combine(combine(token_keys_T, layer_key).unsqueeze(1), experts_E)  # (T, 1) x (E) -> (T, E)


def sum_over_tokens(gates_TK: Tensor, experts_TK: Tensor, load_E: Tensor | None, num_experts: int) -> RoutingSums:
    """Importance, load and counts of one micro-batch.

    Args:
        gates_TK: Gates.
        experts_TK: Chosen experts.
        load_E: Smooth load, or None to take the counts.
        num_experts: E.
    """
    flat_A = experts_TK.reshape(-1)
    importance_E = gates_TK.new_zeros(num_experts).scatter_add(0, flat_A, gates_TK.reshape(-1))
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_A.device)
    counts_E.scatter_add_(0, flat_A, torch.ones_like(flat_A))
    return RoutingSums(importance_E, counts_E.to(gates_TK.dtype) if load_E is None else load_E, counts_E)
