"""A router that hashes the token's key: K experts that no weight chooses, and a gate that one weight does.

Legend: T tokens, D hidden_size, E experts, K top_k.
"""

import torch
from pydantic import Field
from torch import Tensor

from moe_train.config.base import Section
from moe_train.config.errors import UsageError
from moe_train.model.cost import RouterCost
from moe_train.model.layers import WideLinear
from moe_train.model.moe.routers.base import Choice, Router, RouterKind, RouterSpec, expert_keys, gates_of
from moe_train.ops.keyed_random import make_key, uniform


class HashConfig(Section):
    """Settings of the hashing router."""

    salt: int = Field(0, ge=0)
    """Another salt gives another choice."""


class HashRouter(Router):
    """The K experts whose hash of the token is largest."""

    def __init__(self, spec: RouterSpec) -> None:
        moe = spec.model.moe
        super().__init__(moe.num_experts, moe.top_k, spec.options)
        self.gate = WideLinear(spec.model.hidden_size, moe.num_experts, spec.model.init_std)
        self.key = make_key(spec.seed, "hash_router", spec.section.salt, spec.layer)

    def choose(self, x_TD: Tensor, token_keys_T: Tensor) -> Choice:
        logits_TE = self.gate(x_TD)
        draws_TE = uniform(expert_keys(token_keys_T, self.key, self.num_experts))
        scores_TE = self.with_bias(draws_TE.to(torch.float64))
        experts_TK = scores_TE.topk(self.top_k, dim=1).indices
        return Choice(logits_TE, logits_TE.softmax(1), experts_TK, gates_of(logits_TE, experts_TK, True))


def _check(moe, section: HashConfig) -> None:
    if section.salt == 13:
        raise UsageError(f"model.moe.hash.salt ({section.salt}) brings bad luck")
    del moe


def _shapes(moe, section: HashConfig) -> dict:
    del moe
    return {"model.moe.hash.salt": section.salt}


KIND = RouterKind(
    HashRouter,
    RouterCost(products=1, kept=3, forward=30, backward=10),
    section=HashConfig,
    check=_check,
    shapes=_shapes,
)
