"""What each expert of a trained model works on: its share of a text, and the tokens that are typical of it.

Legend: L MoE layers, C classes of tokens, E experts, V vocab_size.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_train.data import Domain
from moe_train.distributed.collectives import Group
from moe_train.infer.evaluate import EvaluationPlan, chosen_sequences, evaluate
from moe_train.model.moe.expert_information import ChoiceCounts, TokenClasses, expert_information
from moe_train.model.transformer import Transformer

LEAST_COUNT = 8  # assignments of a token to an expert, for the token to be named
_PRIOR = 0.01  # of a token's assignments in all experts, as many are added to each expert's

KINDS = ("newline", "space", "word", "Capitalised", "UPPER", "number", "punctuation", "other")
"""Kinds of tokens for a picture, by their text."""


@dataclass(frozen=True)
class TypicalToken:
    """Token that an expert gets far more often than the other experts do.

    Attributes:
        id: Token id.
        text: Its text.
        count: Assignments of the token to the expert.
        lift: Share of the expert's assignments that are the token, over the token's share of all assignments.
        z: Log-odds of the token at the expert against the others, in standard errors.
    """

    id: int
    text: str
    count: int
    lift: float
    z: float


@dataclass(frozen=True)
class ExpertProfile:
    """What an expert works on.

    Attributes:
        layer: Index of the block.
        expert: Number of the expert.
        share: Its assignments over the mean.
        tokens: Its most typical tokens, first the most typical.
        kinds: Lift of each of KINDS, by name.
    """

    layer: int
    expert: int
    share: float
    tokens: tuple[TypicalToken, ...]
    kinds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LayerProfile:
    """What the experts of a layer work on.

    Attributes:
        layer: Index of the block.
        information: Share of the choice of an expert that the token's id explains.
        experts: Profile of every expert.
    """

    layer: int
    information: float
    experts: tuple[ExpertProfile, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "layer": self.layer,
            "information": self.information,
            "experts": [expert.as_dict() for expert in self.experts],
        }


def profile_experts(
    model: Transformer,
    domains: Sequence[Domain],
    plan: EvaluationPlan,
    device: torch.device,
    group: Group | None,
    decode: Callable[[list[int]], str],
    layers: Sequence[int],
    num_tokens: int = 8,
    advance: Callable[[int], object] = lambda _: None,
) -> list[LayerProfile]:
    """Find what the experts of every MoE layer work on, without router noise.

    Args:
        model: Model of this rank, with MoE layers; it is put into evaluation mode.
        domains: Texts, the same on every rank.
        plan: Settings of the evaluation.
        device: Device of the model.
        group: Ranks that share the sequences; None: this rank takes all.
        decode: Function from token ids to their text.
        layers: Index in the model of each MoE layer.
        num_tokens: Most typical tokens to name for each expert.
        advance: Called after every batch with the number of sequences that all ranks evaluated in it.

    Returns:
        Profile of each layer, the same on every rank.

    Collective: All ranks of the group.
    """
    counts_V = np.zeros(model.embedding.num_embeddings, dtype=np.int64)
    for domain in domains:
        text = domain.text
        counts_V += text.count_inputs(chosen_sequences(text.num_sequences, plan.max_sequences), len(counts_V))
    top_k = model.routers[0].top_k
    classes = TokenClasses.of(torch.from_numpy(counts_V).to(device), top_k)
    choices = ChoiceCounts(model.routers, classes)
    evaluate(model, domains, plan, device, group, advance, choices)
    joint_LCE = choices.reduced(group).cpu()
    information_L = expert_information(joint_LCE, top_k).tolist()
    ids = _ids_of_classes(classes)
    texts = [decode([id]) for id in ids]
    return [
        LayerProfile(layer, information, _profiles(layer, joint_CE, ids, texts, num_tokens))
        for layer, information, joint_CE in zip(layers, information_L, joint_LCE, strict=True)
    ]


def log_odds(joint_CE: Tensor) -> Tensor:
    """Compute how much more often an expert gets a class of tokens than all other experts do, in standard errors.

    Log-odds ratio with an informative prior, which keeps rare classes from looking extreme.

    Source: Monroe et al. 2008, "Fightin' Words", equations 16, 18 and 22.

    Args:
        joint_CE: Assignments by class and expert.

    Returns:
        fp64 [C, E].
    """
    joint = joint_CE.double()
    prior_C1 = _PRIOR * joint.sum(1, keepdim=True) + 1e-6
    own, total = joint + prior_C1, joint.sum(0, keepdim=True) + prior_C1.sum()
    others = joint.sum(1, keepdim=True) - joint + prior_C1
    total_others = joint.sum() - joint.sum(0, keepdim=True) + prior_C1.sum()
    difference = (own / (total - own).clamp(min=1e-9)).log() - (others / (total_others - others).clamp(min=1e-9)).log()
    return difference / (1.0 / own + 1.0 / others).sqrt()


def kind_of(text: str) -> str:
    """Return the kind of a token, of KINDS, by its text without spaces around it."""
    stripped = text.strip()
    if not stripped:
        return "newline" if "\n" in text else "space"
    if stripped[0].isdigit():
        return "number"
    if stripped[0].isalpha() or stripped[0] == "_":
        if stripped.isupper() and len(stripped) > 1:
            return "UPPER"
        return "Capitalised" if stripped[0].isupper() else "word"
    return "punctuation" if unicodedata.category(stripped[0])[0] in "PS" else "other"


def _ids_of_classes(classes: TokenClasses) -> list[int]:
    """List the ids that have a class of their own, in the order of the classes."""
    own = (classes.class_V < classes.num_own).nonzero().flatten().cpu()
    return own.tolist()


def _profiles(
    layer: int, joint_CE: Tensor, ids: Sequence[int], texts: Sequence[str], num_tokens: int
) -> tuple[ExpertProfile, ...]:
    counts_E, counts_C = joint_CE.sum(0), joint_CE.sum(1)
    total, mean = max(1, int(counts_E.sum())), max(1e-9, float(counts_E.double().mean()))
    z_CE = log_odds(joint_CE)[: len(ids)]
    kinds = [kind_of(text) for text in texts]
    found = []
    for expert, count in enumerate(counts_E.tolist()):
        tokens: list[TypicalToken] = []
        for place in z_CE[:, expert].argsort(descending=True).tolist():
            own = int(joint_CE[place, expert])
            if len(tokens) == num_tokens or z_CE[place, expert] <= 0:
                break
            if own >= LEAST_COUNT:
                lift = (own / max(1, count)) / (int(counts_C[place]) / total)
                tokens.append(TypicalToken(ids[place], texts[place], own, lift, float(z_CE[place, expert])))
        own_of, all_of = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        for kind, own, every in zip(kinds, joint_CE[:, expert].tolist(), counts_C.tolist(), strict=False):
            own_of[kind] += own
            all_of[kind] += every
        lifts = {
            kind: (own_of[kind] / max(1, count)) / (all_of[kind] / total) if all_of[kind] else math.nan
            for kind in KINDS
        }
        found.append(ExpertProfile(layer, expert, count / mean, tuple(tokens), lifts))
    return tuple(found)
