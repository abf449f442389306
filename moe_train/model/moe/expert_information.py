"""What the choice of experts tells of the tokens: counts over evaluated text, and the information in them.

Legend: B batch, S sequence, T tokens, K top_k, E experts, L MoE layers, V vocab_size, C classes of tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_train.distributed.collectives import Group, all_reduce_sum
from moe_train.model.moe.routers.base import Router
from moe_train.model.moe.steps import Routing

_LEAST_ASSIGNMENTS = 64  # of a token id, for a class of its own
_MOST_CLASSES = 4096  # of single ids, the most frequent ones: the counts must have room on the device
_SHARED_CLASSES = 64  # of all other ids, by a hash
_HASH_FACTOR = 2654435761  # 2^32 / golden ratio (Knuth, multiplicative hashing)


@dataclass(frozen=True)
class TokenClasses:
    """Classes of token ids: an id that is frequent in a text has its own, all others share a few.

    Attributes:
        class_V: int64, class of every token id.
        num_own: Number of classes that are one id each; they come first, by ascending id.
    """

    class_V: Tensor
    num_own: int

    @property
    def num_classes(self) -> int:
        """C, number of classes."""
        return self.num_own + _SHARED_CLASSES

    @staticmethod
    def of(counts_V: Tensor, top_k: int) -> "TokenClasses":
        """Make the classes for a text.

        Args:
            counts_V: int64, how often each id is in the text.
            top_k: K; an id has a class of its own if it is seen at least 64 / min(K, 2) times.
        """
        vocab_size, device = len(counts_V), counts_V.device
        frequent = counts_V >= _LEAST_ASSIGNMENTS // min(top_k, 2)
        if int(frequent.sum()) > _MOST_CLASSES:
            best = counts_V.sort(descending=True, stable=True).indices[:_MOST_CLASSES]
            frequent = torch.zeros_like(frequent).index_fill(0, best, True)
        ids_V = torch.arange(vocab_size, device=device)
        num_own = int(frequent.sum())
        shared_V = num_own + ((ids_V * _HASH_FACTOR) % 2**32) * _SHARED_CLASSES // 2**32
        return TokenClasses(torch.where(frequent, frequent.cumsum(0) - 1, shared_V), num_own)


class ChoiceCounts:
    """Counts of the assignments of every layer's experts, by the class of the token, over evaluated text."""

    def __init__(self, routers: Sequence[Router], classes: TokenClasses) -> None:
        """Start at zero.

        Args:
            routers: Routers of the MoE layers; at least one.
            classes: Classes of token ids.
        """
        self._routers, self._classes = list(routers), classes
        shape = len(routers), classes.num_classes, routers[0].num_experts
        self.joint_LCE = torch.zeros(shape, dtype=torch.int64, device=classes.class_V.device)

    @contextmanager
    def counting(self, ids_BS: Tensor, is_counted_BS: Tensor) -> Iterator[None]:
        """Count what the routers choose in the block: one forward pass of these tokens.

        Args:
            ids_BS: int64 token ids of the pass; all copies of a token have its id.
            is_counted_BS: bool, tokens that count; the others are padding.
        """
        classes_BS = self._classes.class_V[ids_BS]
        with ExitStack() as hooks:
            for layer, router in enumerate(self._routers):
                add = partial(self._add, layer, classes_BS, is_counted_BS)
                hooks.callback(router.register_forward_hook(add).remove)
            yield

    def _add(
        self, layer: int, classes_BS: Tensor, is_counted_BS: Tensor, router: Router, inputs: object, routing: Routing
    ) -> None:
        num_experts, copies = router.num_experts, len(routing.experts_TK) // max(1, classes_BS.numel())
        classes_T, is_counted_T = (x.repeat(1, copies).flatten() for x in (classes_BS, is_counted_BS))
        places_TK = classes_T.unsqueeze(1) * num_experts + routing.experts_TK
        counted_TK = is_counted_T.unsqueeze(1).expand_as(places_TK).to(torch.int64)
        self.joint_LCE[layer].view(-1).scatter_add_(0, places_TK.flatten(), counted_TK.flatten())

    def reduced(self, group: Group | None) -> Tensor:
        """Add up the counts of all ranks that evaluate, int64 [L, C, E]. Collective: all ranks of the group."""
        return all_reduce_sum(self.joint_LCE, group)


def expert_information(joint_LCE: Tensor, top_k: int) -> Tensor:
    """Compute the share of the choice of an expert that the token's id explains: I(expert; class) / H(expert).

    0: the choice knows nothing of the token's id; 1: the id decides it. I is in nats, less the bias that independent
    choices of K different experts have on average, (C - 1) (E - K) / (2 N) for C classes that occur and N assignments;
    so a value may be a little below 0.

    Args:
        joint_LCE: [..., C, E], assignments by class and expert.
        top_k: K, experts of a token.

    Returns:
        fp64 [...]; 0 where one expert has all assignments.
    """
    joint = joint_LCE.double()
    total = joint.sum((-2, -1)).clamp(min=1.0)
    probability = joint / total[..., None, None]
    class_C, expert_E = probability.sum(-1), probability.sum(-2)
    entropy = -torch.xlogy(expert_E, expert_E).sum(-1)
    both = -torch.xlogy(probability, probability).sum((-2, -1))
    information = entropy - torch.xlogy(class_C, class_C).sum(-1) - both
    num_classes, num_experts = (class_C > 0).sum(-1), joint.shape[-1]
    bias = (num_classes - 1).clamp(min=0) * (num_experts - top_k) / (2.0 * total)
    return torch.where(entropy > 1e-12, (information - bias) / entropy.clamp(min=1e-12), torch.zeros_like(entropy))


def clean_kappa(agreement: Tensor, top_k: int, num_experts: int) -> Tensor:
    """Scale an agreement so that dice have 0 and a choice that noise does not change has 1 (Cohen 1960).

    Args:
        agreement: Share of the assignments that the router would have made without its noise too.
        top_k: K, experts of a token.
        num_experts: E, more than K: else there is no choice.

    Returns:
        As agreement.
    """
    chance = top_k / num_experts
    return (agreement - chance) / (1.0 - chance)
