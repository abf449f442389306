"""Interface of routers, and the parts that all routers share.

Legend: T tokens, D hidden_size, E experts, K top_k, N sequences, S tokens of one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config.base import Section
from moe_train.config.model import ModelConfig
from moe_train.config.moe import MoEConfig
from moe_train.distributed.collectives import Group, all_reduce_sum, group_size
from moe_train.model.cost import RouterCost
from moe_train.model.moe.routers.last_step import LAST_STEP_BUFFERS, add_buffers
from moe_train.model.moe.steps import Routing, RoutingSums
from moe_train.model.parameters import Constant, InitialValue
from moe_train.ops.kernels import token_kernels_for
from moe_train.ops.keyed_random import combine, make_key, uniform

_TIE_KEY = make_key("router_tie_break")
_GROUP_TIE_KEY = make_key("router_group_tie_break")


@dataclass(frozen=True)
class InputJitter:
    """Uniform factors from 1 - size to 1 + size for the router's input (Fedus et al. 2021, arXiv 2101.03961, 2.2).

    Attributes:
        size: Half-width of the factors.
        layer_key: 64-bit random key of the layer.
    """

    size: float
    layer_key: int

    def __call__(self, x_TD: Tensor, token_keys_T: Tensor) -> Tensor:
        """Multiply every element of the rows by its own factor, which is the same on any layout. At least fp32."""
        keys_TD = expert_keys(token_keys_T, self.layer_key, x_TD.shape[1])
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return x_TD.to(wide) * (1.0 + self.size * (2.0 * uniform(keys_TD) - 1.0)).to(wide)


# Sums that not every run needs; they are zero unless a loss or telemetry needs them.
OPTIONAL_SUMS = frozenset({"probability", "sequence_balance", "squared_logsumexp", "entropy", "agreement"})


@dataclass(frozen=True)
class RouterOptions:
    """Options that all routers have.

    Attributes:
        jitter: Jitter of the input in training; None: no jitter.
        has_selection_bias: Whether a bias that is not trained takes part in the choice (loss-free balancing).
        optional_sums: Members of OPTIONAL_SUMS that a loss or telemetry needs.
        remembered_sums: Members of `last_step.REMEMBERED` that a loss needs.
    """

    jitter: InputJitter | None = None
    has_selection_bias: bool = False
    optional_sums: frozenset[str] = OPTIONAL_SUMS
    remembered_sums: frozenset[str] = frozenset()


PLAIN = RouterOptions()


@dataclass(frozen=True)
class Choice:
    """Experts that a router has chosen for its tokens, and what led to them.

    Attributes:
        logits_TE: fp32 or wider, clean logits.
        probability_TE: fp32 or wider, distribution over all experts; differentiable.
        experts_TK: int64, chosen experts.
        gates_TK: fp32 or wider, gates of the chosen experts.
        load_E: Smooth load; None: the counts.
        clean_experts_TK: int64, experts that it would have chosen without its noise; None: it has drawn none, or
            nobody asks (`agreement` is not among the optional sums).
    """

    logits_TE: Tensor
    probability_TE: Tensor
    experts_TK: Tensor
    gates_TK: Tensor
    load_E: Tensor | None = None
    clean_experts_TK: Tensor | None = None


class Router(nn.Module, ABC):
    """A router, which chooses K experts for every token. Each kind of router implements `choose`."""

    selection_bias: Tensor | None

    def __init__(self, num_experts: int, top_k: int, options: RouterOptions) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.options = num_experts, top_k, options
        # A buffer: it is moved by a rule after each step and not by the optimizer. fp32, whatever the weights are.
        bias = torch.zeros(num_experts, dtype=torch.float32) if options.has_selection_bias else None
        self.register_buffer("selection_bias", bias)
        add_buffers(self, num_experts, options.remembered_sums)

    def initial_values(self) -> dict[str, InitialValue]:
        return {name: Constant(0.0) for name in ("selection_bias", *LAST_STEP_BUFFERS)}

    @abstractmethod
    def choose(self, x_TD: Tensor, token_keys_T: Tensor) -> Choice:
        """Choose the experts and gates of every token; the arguments are those of `forward`."""

    def forward(
        self, x_TD: Tensor, token_keys_T: Tensor, num_sequences: int = 1, sharing: Group | None = None
    ) -> Routing:
        """Route tokens.

        Args:
            x_TD: Token rows.
            token_keys_T: int64 random key of each token, the same on any layout.
            num_sequences: Number of sequences of equal length that the tokens form.
            sharing: Ranks that have the other tokens of the sequences, equally many; None: the sequences are whole.

        Collective: All ranks of `sharing`, if the balance of each sequence is wanted.
        """
        if self.training and self.options.jitter is not None:
            x_TD = self.options.jitter(x_TD, token_keys_T)
        choice = self.choose(x_TD, token_keys_T)
        sums = sum_over_tokens(choice, num_sequences, self.options.optional_sums, sharing)
        return Routing(choice.gates_TK, choice.experts_TK, choice.logits_TE, sums)

    def with_bias(self, scores_TE: Tensor) -> Tensor:
        """Add the selection bias to the scores, if there is one."""
        return scores_TE if self.selection_bias is None else scores_TE + self.selection_bias


@dataclass(frozen=True)
class RouterSpec:
    """Settings that a router is built from.

    Attributes:
        model: Model section of the configuration.
        section: Own section of the router; None: it has none.
        layer: Index of the block, from 0.
        seed: Seed of the run: every random draw is keyed by it.
        options: Options that all routers have.
    """

    model: ModelConfig
    section: Any
    layer: int
    seed: int
    options: RouterOptions


@dataclass(frozen=True)
class RouterKind:
    """Description of a kind of router.

    Attributes:
        build: Function that makes the router of a layer.
        cost: Cost of the router, for the planner.
        has_smooth_load: Whether its load has a gradient (`Choice.load_E`), which the CV^2 loss of the load needs.
        has_noise: Whether it draws noise in training, so that it may choose by the noise alone.
        section: Class of its own settings, written under model.moe.NAME; None: its settings are fields of model.moe.
        check: Function that refuses settings that cannot work: it raises UsageError naming fields and values.
        shapes: Function that gives the settings on which the meaning of a checkpoint's weights depends, by field name;
            a run cannot be resumed with others.
    """

    build: Callable[[RouterSpec], Router]
    cost: RouterCost
    has_smooth_load: bool = False
    has_noise: bool = False
    section: type[Section] | None = None
    check: Callable[[MoEConfig, Any], None] = lambda moe, section: None
    shapes: Callable[[MoEConfig, Any], dict[str, Any]] = lambda moe, section: {}


def choose_groups(scores_TG: Tensor, token_keys_T: Tensor, top_k_groups: int) -> Tensor:
    """Choose groups as `choose_experts` chooses experts, with draws of their own. int64 [T, top_k_groups]."""
    return choose_experts(scores_TG, token_keys_T, top_k_groups, _GROUP_TIE_KEY)


def choose_experts(scores_TE: Tensor, token_keys_T: Tensor, top_k: int, tie_key: int = _TIE_KEY) -> Tensor:
    """Choose the K best experts of every token, best first; a keyed draw orders equal scores, not the expert number.

    Without the draw, the zero logits of an untrained router would send every token to the first experts.

    Args:
        scores_TE: Scores that decide.
        token_keys_T: int64 random key of each token.
        top_k: K, experts per token.
        tie_key: 64-bit key of the draws.

    Returns:
        int64 [T, K].
    """
    kernels = token_kernels_for(scores_TE)
    if kernels is not None and scores_TE.dtype == torch.float32 and scores_TE.shape[1] <= kernels.MOST_EXPERTS:
        return kernels.choose(scores_TE.detach(), token_keys_T, tie_key, top_k)  # one launch in place of thirty
    keys_TE = expert_keys(token_keys_T, tie_key, scores_TE.shape[1])
    if scores_TE.dtype == torch.float32:
        return _ranks_of(scores_TE.detach(), keys_TE).topk(top_k, dim=1).indices
    shuffle_TE = keys_TE.argsort(dim=1)
    # A stable sort of the shuffled scores: the draw decides between equal scores and nothing else.
    ranked_TE = scores_TE.detach().gather(1, shuffle_TE).argsort(dim=1, descending=True, stable=True)
    return shuffle_TE.gather(1, ranked_TE[:, :top_k])


def _ranks_of(scores_TE: Tensor, keys_TE: Tensor) -> Tensor:
    """Make integers in the order of fp32 scores and, for equal scores, in the reverse order of the keys.

    One choice among integers takes a third of the time of two sorts. int64 [T, E].
    """
    bits_TE = (scores_TE + 0.0).view(torch.int32).long()  # + 0: the zeros of both signs are equal
    # In negative numbers, the bits below the sign count backwards.
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)
    return (ordered_TE << 32) + (0x7FFFFFFF - (keys_TE >> 32))  # upper half the score, lower half the draw


def gates_of(logits_TE: Tensor, experts_TK: Tensor, renormalize: bool) -> Tensor:
    """Compute the gates of the chosen experts: softmax over them, or their softmax probability among all. [T, K]."""
    if renormalize:
        return logits_TE.gather(1, experts_TK).softmax(1)
    return logits_TE.softmax(1).gather(1, experts_TK)


def expert_keys(token_keys_T: Tensor, layer_key: int, num_experts: int) -> Tensor:
    """Make a random key for every token and expert (or other column) of a layer. int64 [T, E]."""
    experts_E = torch.arange(num_experts, dtype=torch.int64, device=token_keys_T.device)
    return combine(combine(token_keys_T, layer_key).unsqueeze(1), experts_E)  # (T, 1) x (E) -> (T, E)


def sum_over_tokens(
    choice: Choice, num_sequences: int, wanted: frozenset[str] = OPTIONAL_SUMS, sharing: Group | None = None
) -> RoutingSums:
    """Compute the sums of one micro-batch; dropped and rows are zero, because a router does not know them.

    Args:
        choice: Choice of the router.
        num_sequences: N, number of sequences.
        wanted: Members of OPTIONAL_SUMS to compute; the others are zero.
        sharing: Ranks that have the other tokens of the sequences; None: the sequences are whole. The balance is that
            of whole sequences, on each of these ranks, and each counts all of the sequences.

    Collective: All ranks of `sharing`, if the balance of each sequence is wanted.
    """
    logits_TE, experts_TK, gates_TK = choice.logits_TE, choice.experts_TK, choice.gates_TK
    (num_tokens, num_experts), top_k = logits_TE.shape, experts_TK.shape[1]
    length = num_tokens // num_sequences
    flat_A = experts_TK.reshape(-1)  # (T, K) -> (T*K)
    importance_E = gates_TK.new_zeros(num_experts).scatter_add(0, flat_A, gates_TK.reshape(-1))
    counts_NE = torch.zeros(num_sequences, num_experts, dtype=torch.int64, device=flat_A.device)
    per_sequence = experts_TK.reshape(num_sequences, length * top_k)  # (T, K) -> (N, S*K)
    counts_NE.scatter_add_(1, per_sequence, torch.ones_like(per_sequence))
    counts_E, zero = counts_NE.sum(0), gates_TK.new_zeros(())
    probability_E, balance = torch.zeros_like(importance_E), zero
    if "probability" in wanted:
        probability_E = choice.probability_TE.sum(0)
    if "sequence_balance" in wanted:
        probability_NE = choice.probability_TE.view(num_sequences, length, num_experts).sum(1)
        counted_NE = counts_NE.to(probability_NE.dtype)
        if sharing is not None:  # one all-reduce for both
            both = all_reduce_sum(torch.stack((counted_NE, probability_NE)), sharing)
            (counted_NE, probability_NE), length = both.unbind(0), length * group_size(sharing)
        # E f p = E (counts / (K S)) (probability / S)
        balance = (counted_NE.detach() * probability_NE).sum() * (num_experts / max(1, top_k * length * length))
    return RoutingSums(
        importance=importance_E,
        load=counts_E.to(gates_TK.dtype) if choice.load_E is None else choice.load_E,
        probability=probability_E,
        counts=counts_E,
        dropped=torch.zeros_like(counts_E),
        sequence_balance=balance,
        squared_logsumexp=logits_TE.logsumexp(1).square().sum() if "squared_logsumexp" in wanted else zero,
        entropy=_entropy(choice.probability_TE) if "entropy" in wanted else zero,
        agreement=_agreement(choice) if "agreement" in wanted else counts_E.new_zeros(()),
        tokens=counts_E.new_full((), num_tokens),
        sequences=counts_E.new_full((), num_sequences),
        rows=counts_E.new_zeros(()),
    )


@torch.no_grad()
def _entropy(probability_TE: Tensor) -> Tensor:
    # Sum over tokens of -sum p log p, nats; xlogy takes 0 log 0 as 0.
    return -torch.xlogy(probability_TE, probability_TE).sum()


def _agreement(choice: Choice) -> Tensor:
    """Count the assignments that the router would have made without its noise too; 0 if it has drawn none."""
    if choice.clean_experts_TK is None:
        return choice.experts_TK.new_zeros(())
    return (choice.experts_TK.unsqueeze(2) == choice.clean_experts_TK.unsqueeze(1)).sum()  # (T, K, 1) x (T, 1, K)
