"""Evaluation of a trained model on text: loss and expert load for each source.

Results do not depend on the number of ranks: they stay sums over sequences until the end, and the batches are the same
on any number of ranks. Where every rank holds all experts and whole sequences, results are the same to the last bit.
Legend: B sequences of a batch, S tokens per sequence, N sequences of a domain, L MoE layers, E experts.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_train.data import Domain
from moe_train.data.recovery import ALL_RECOVERED, Unrecovered
from moe_train.distributed.collectives import Group, all_reduce_sum, group_rank, group_size
from moe_train.distributed.context import ContextRanks
from moe_train.model.moe.expert_information import ChoiceCounts
from moe_train.model.transformer import LossOutput, Transformer
from moe_train.ops.cross_entropy import IGNORED_TARGET
from moe_train.train.batches import make_tokens, own_targets


@dataclass(frozen=True)
class EvaluationPlan:
    """Settings of an evaluation.

    Attributes:
        batch_size: Sequences per rank, or per ranks that share sequences, and forward pass.
        max_sequences: Most sequences per domain, evenly spread over it; None: all.
        end_of_document: Id of the end-of-document token, where the model isolates documents; None: it does not.
        context: Ranks that share this rank's sequences; None: it has whole sequences.
    """

    batch_size: int
    max_sequences: int | None = None
    end_of_document: int | None = None
    context: ContextRanks | None = None

    def ranks_of(self, length: int) -> ContextRanks | None:
        """Return the ranks that share rows of a length; None: one rank takes them whole, as they cannot be shared."""
        shared = self.context is not None and length % (2 * self.context.size) == 0
        return self.context if shared else None


@dataclass(frozen=True)
class Evaluation:
    """Results of the evaluation of one text.

    Attributes:
        name: Name of the domain; "all" for all domains together.
        loss_sum: Sum of the cross-entropy of all tokens, in nats.
        tokens: Number of predicted tokens.
        sequences: Number of evaluated sequences.
        num_bytes: Bytes of the evaluated text as UTF-8; the share of the bytes where only some sequences were
            evaluated.
        counts: Assignments per expert and MoE layer, L tuples of E.
        dropped: Dropped assignments per expert and MoE layer, for which the expert had no room; L tuples of E.
        text_bytes: Bytes of the whole text as UTF-8, evaluated or not.
        unrecovered: What decoding the tokens of the whole text does not give back.
    """

    name: str
    loss_sum: float
    tokens: int
    sequences: int
    num_bytes: float
    counts: tuple[tuple[int, ...], ...]
    dropped: tuple[tuple[int, ...], ...]
    text_bytes: int
    unrecovered: Unrecovered = ALL_RECOVERED

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats per token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity exp(loss); infinite where exp would overflow."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf  # exp(710) overflows

    @property
    def bits_per_byte(self) -> float | None:
        """Cross-entropy in bits per byte of text, which is comparable between tokenizers.

        None where decoding does not give the text back, because the model then predicts another, shorter text.
        """
        return None if self.unrecovered else self.loss_sum / math.log(2) / self.num_bytes

    @property
    def dropped_fraction(self) -> float:
        """Share of the assignments that were dropped."""
        return sum(map(sum, self.dropped)) / max(1, sum(map(sum, self.counts)))

    def shares(self, layer: int) -> list[float]:
        """Compute the assignments of every expert of a layer, divided by their mean.

        Args:
            layer: Index of the layer among the MoE layers.

        Returns:
            One share per expert; 1 is the mean.
        """
        counts = self.counts[layer]
        mean = max(sum(counts) / len(counts), 1e-9)
        return [count / mean for count in counts]

    @property
    def max_violation(self) -> float | None:
        """MaxVio of the worst layer, the share of its busiest expert minus 1; None without MoE layers."""
        return max((max(self.shares(layer)) - 1.0 for layer in range(len(self.counts))), default=None)

    def as_dict(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return the results as plain values for JSON.

        Args:
            layers: Index in the model of each MoE layer.
        """
        return {
            "name": self.name,
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "bytes": round(self.num_bytes),
            "lost_bytes_share": self.unrecovered.num_bytes / self.text_bytes,
            "dropped_fraction": self.dropped_fraction,
            "max_violation": self.max_violation,
            "experts": [
                {"layer": layer, "counts": list(counts), "shares": self.shares(i), "dropped": list(self.dropped[i])}
                for i, (layer, counts) in enumerate(zip(layers, self.counts, strict=True))
            ],
        }


def evaluate(
    model: Transformer,
    domains: Sequence[Domain],
    plan: EvaluationPlan,
    device: torch.device,
    group: Group | None = None,
    advance: Callable[[int], object] = lambda _: None,
    choices: ChoiceCounts | None = None,
) -> list[Evaluation]:
    """Evaluate a model on each domain, without router noise.

    Args:
        model: Model of this rank; it is put into evaluation mode.
        domains: Texts to evaluate on, the same on every rank.
        plan: Settings of the evaluation.
        device: Device of the model.
        group: Ranks that share the sequences; None: this rank takes all.
        advance: Called after every batch with the number of sequences that all ranks evaluated in it.
        choices: Counts to which the choice of experts of every token is added on this rank; None: they are not counted.

    Returns:
        Results of each domain, the same on every rank.

    Collective: All ranks of the group.
    """
    model.eval()
    return [_evaluate_domain(model, domain, plan, device, group, advance, choices) for domain in domains]


def chosen_sequences(num_sequences: int, max_sequences: int | None) -> np.ndarray:
    """Choose sequences to evaluate, evenly spread.

    Args:
        num_sequences: Sequences of the domain.
        max_sequences: Most sequences to choose; None: all.

    Returns:
        int64, the numbers of the chosen sequences, ascending.
    """
    wanted = num_sequences if max_sequences is None else min(max_sequences, num_sequences)
    return np.arange(wanted, dtype=np.int64) * num_sequences // max(1, wanted)


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Join the results of several domains as if they were one text.

    Args:
        evaluations: Results of each domain; at least one.

    Returns:
        Results of the joined text, with the name "all".
    """

    def add(tables: Sequence[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(map(sum, zip(*layer, strict=True))) for layer in zip(*tables, strict=True))

    return Evaluation(
        name="all",
        loss_sum=math.fsum(each.loss_sum for each in evaluations),
        tokens=sum(each.tokens for each in evaluations),
        sequences=sum(each.sequences for each in evaluations),
        num_bytes=sum(each.num_bytes for each in evaluations),
        counts=add([each.counts for each in evaluations]),
        dropped=add([each.dropped for each in evaluations]),
        text_bytes=sum(each.text_bytes for each in evaluations),
        unrecovered=sum((each.unrecovered for each in evaluations), ALL_RECOVERED),
    )


@torch.no_grad()
def _evaluate_domain(
    model: Transformer,
    domain: Domain,
    plan: EvaluationPlan,
    device: torch.device,
    group: Group | None,
    advance: Callable[[int], object],
    choices: ChoiceCounts | None,
) -> Evaluation:
    text = domain.text
    chosen = chosen_sequences(text.num_sequences, plan.max_sequences)
    batches = _batches(chosen, plan.batch_size, text.num_tokens // text.sequence_length)
    losses_N = torch.zeros(len(chosen), dtype=torch.float64, device=device)
    num_layers, num_experts = len(model.routers), model.routers[0].num_experts if model.routers else 0
    routed_2LE = torch.zeros(2, num_layers, num_experts, dtype=torch.int64, device=device)
    num_sharing = 1 if plan.context is None else plan.context.size
    size, reader = group_size(group) // num_sharing, group_rank(group) // num_sharing
    for start in range(0, len(batches), size):
        here = batches[start : start + size]
        # A rank without a batch runs one token that is not counted, because other ranks may need its experts.
        places = here[reader] if reader < len(here) else np.empty(0, np.int64)
        if len(places) and plan.context is not None and plan.context.rank > 0:
            length = min(text.sequence_length, text.num_tokens - int(chosen[places[0]]) * text.sequence_length)
            places = places if plan.ranks_of(length) is not None else np.empty(0, np.int64)
        if len(places) == 0:
            ids_BS = np.full((1, 1), text.end_of_document, dtype=np.int64)
            model(make_tokens(ids_BS, np.zeros(1, np.int64), 0, plan.end_of_document, device))
        else:
            losses_B, sums = _measure(model, domain, chosen[places], plan, device, choices)
            losses_N[torch.from_numpy(places).to(device)] = losses_B
            if sums is not None:
                routed_2LE += sums
        advance(sum(map(len, here)))
    # A whole sequence has its loss on one rank and zero on the others. So this sum is exact, and the order of the sum
    # over sequences does not depend on the ranks.
    losses_N, routed_2LE = all_reduce_sum(losses_N, group), all_reduce_sum(routed_2LE, group)
    counts, dropped = (tuple(map(tuple, table)) for table in routed_2LE.tolist())
    lengths = np.minimum((chosen + 1) * text.sequence_length, text.num_tokens) - chosen * text.sequence_length
    tokens = int(lengths.sum())
    return Evaluation(
        name=domain.name,
        loss_sum=math.fsum(losses_N.tolist()),
        tokens=tokens,
        sequences=len(chosen),
        num_bytes=text.num_bytes * tokens / text.num_tokens,
        counts=counts,
        dropped=dropped,
        text_bytes=text.num_bytes,
        unrecovered=text.unrecovered,
    )


def _batches(chosen: np.ndarray, batch_size: int, num_whole: int) -> list[np.ndarray]:
    """Group places among the chosen sequences into batches; the last sequence, if shorter, has a batch of its own."""
    whole = np.flatnonzero(chosen < num_whole)
    short = np.flatnonzero(chosen >= num_whole)
    batches = [whole[start : start + batch_size] for start in range(0, len(whole), batch_size)]
    return batches + ([short] if len(short) else [])


def _measure(
    model: Transformer,
    domain: Domain,
    sequences: np.ndarray,
    plan: EvaluationPlan,
    device: torch.device,
    choices: ChoiceCounts | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the loss of each sequence, or of this rank's tokens of it, fp64 [B], and the experts' counts [2, L, E].

    The counts are those of all tokens and of the dropped ones.
    """
    ids_BS, targets = domain.text.batch(sequences)
    length = int((targets[0] != IGNORED_TARGET).sum())  # without padding, which would take room at the experts
    context = plan.ranks_of(length)
    targets_BS = own_targets(targets[:, :length], context, device)
    tokens = make_tokens(ids_BS[:, :length], sequences, 0, plan.end_of_document, device, context)
    are_counted_BS = torch.ones_like(tokens.ids_BS, dtype=torch.bool)
    with choices.counting(tokens.ids_BS, are_counted_BS) if choices is not None else nullcontext():
        output: LossOutput = model(tokens, targets_BS=targets_BS)
    losses_B = output.losses_BS.double().sum(1)
    if output.sums is None:
        return losses_B, None
    return losses_B, torch.stack((output.sums.counts, output.sums.dropped))
