"""A trained model measured on text: loss, and which experts the tokens of each source pass.

Every number is a sum over sequences until the end, and batches are the same on any number of ranks, so that it does not
depend on their number; on one of experts it is the same to the last bit for any number of ranks that hold all experts.
Legend: B sequences of a batch, S tokens of each, N sequences of a domain, L MoE layers, E experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_train.data import Domain
from moe_train.distributed.collectives import Group, all_reduce_sum, group_rank, group_size
from moe_train.model.transformer import Transformer
from moe_train.ops.cross_entropy import IGNORED_TARGET, token_cross_entropy
from moe_train.train.batches import make_tokens


@dataclass(frozen=True)
class EvaluationPlan:
    """How text is measured.

    Attributes:
        batch_size: Sequences of one rank in one forward pass.
        max_sequences: Of each domain, evenly spread over it; None: all.
        end_of_document: The mark, where the model isolates documents; None: it does not.
    """

    batch_size: int
    max_sequences: int | None = None
    end_of_document: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a text.

    Attributes:
        name: Of the domain; "all" of all together.
        loss_sum: Cross-entropy over all tokens, in nats.
        tokens: Predicted tokens.
        sequences: Sequences they are in.
        num_bytes: Of the text that was measured: its bytes as UTF-8, or their share where not all sequences were.
        counts: Assignments of every expert in every MoE layer, L lists of E.
        dropped: Those of them that the experts had no room for.
    """

    name: str
    loss_sum: float
    tokens: int
    sequences: int
    num_bytes: float
    counts: tuple[tuple[int, ...], ...]
    dropped: tuple[tuple[int, ...], ...]

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats a token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that does not fit."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf  # exp(710) overflows

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in bits over the bytes of the text: comparable between tokenizers."""
        return self.loss_sum / math.log(2) / self.num_bytes

    @property
    def dropped_fraction(self) -> float:
        """Assignments without room over all."""
        return sum(map(sum, self.dropped)) / max(1, sum(map(sum, self.counts)))

    def shares(self, layer: int) -> list[float]:
        """Assignments of every expert of an MoE layer (counted among those) over the mean."""
        counts = self.counts[layer]
        mean = max(sum(counts) / len(counts), 1e-9)
        return [count / mean for count in counts]

    @property
    def max_violation(self) -> float | None:
        """MaxVio of the worst layer; None without MoE layers."""
        return max((max(self.shares(layer)) - 1.0 for layer in range(len(self.counts))), default=None)

    def as_dict(self, layers: Sequence[int]) -> dict[str, Any]:
        """Plain values for JSON.

        Args:
            layers: The MoE layers' numbers in the model.
        """
        return {
            "name": self.name,
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "bytes": round(self.num_bytes),
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
) -> list[Evaluation]:
    """Measure each domain, without router noise.

    Args:
        model: Of this rank.
        domains: The same on every rank.
        plan: How.
        device: Where the model is.
        group: Ranks that share the sequences; None: this one takes all.
        advance: Told the sequences that were measured since, on all ranks.

    Collective: All ranks of the group.
    """
    model.eval()
    return [_evaluate_domain(model, domain, plan, device, group, advance) for domain in domains]


def chosen_sequences(num_sequences: int, max_sequences: int | None) -> np.ndarray:
    """Numbers of the sequences to measure, evenly spread. int64."""
    wanted = num_sequences if max_sequences is None else min(max_sequences, num_sequences)
    return np.arange(wanted, dtype=np.int64) * num_sequences // max(1, wanted)


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several domains as one text."""

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
    )


@torch.no_grad()
def _evaluate_domain(
    model: Transformer,
    domain: Domain,
    plan: EvaluationPlan,
    device: torch.device,
    group: Group | None,
    advance: Callable[[int], object],
) -> Evaluation:
    text = domain.text
    chosen = chosen_sequences(text.num_sequences, plan.max_sequences)
    batches = _batches(chosen, plan.batch_size, text.num_tokens // text.sequence_length)
    losses_N = torch.zeros(len(chosen), dtype=torch.float64, device=device)
    num_layers, num_experts = len(model.routers), model.routers[0].num_experts if model.routers else 0
    routed_2LE = torch.zeros(2, num_layers, num_experts, dtype=torch.int64, device=device)
    size, rank = group_size(group), group_rank(group)
    for start in range(0, len(batches), size):
        here = batches[start : start + size]
        # A rank for which none is left takes part with a token that is not counted: it may hold others' experts.
        places = here[rank] if rank < len(here) else np.empty(0, np.int64)
        if len(places) == 0:
            ids_BS = np.full((1, 1), text.end_of_document, dtype=np.int64)
            model(make_tokens(ids_BS, np.zeros(1, np.int64), 0, plan.end_of_document, device))
        else:
            losses_B, sums = _measure(model, domain, chosen[places], plan, device)
            losses_N[torch.from_numpy(places).to(device)] = losses_B
            if sums is not None:
                routed_2LE += sums
        advance(sum(map(len, here)))
    # One rank has each sequence's loss and the others zero: the sum is exact, and then taken in one order.
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
    )


def _batches(chosen: np.ndarray, batch_size: int, num_whole: int) -> list[np.ndarray]:
    """Places among the chosen sequences, batch by batch: whole ones together, the one that is cut short alone."""
    whole = np.flatnonzero(chosen < num_whole)
    short = np.flatnonzero(chosen >= num_whole)
    batches = [whole[start : start + batch_size] for start in range(0, len(whole), batch_size)]
    return batches + ([short] if len(short) else [])


def _measure(
    model: Transformer, domain: Domain, sequences: np.ndarray, plan: EvaluationPlan, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Loss of each sequence, fp64 [B], and counts and dropped assignments of the experts, [2, L, E]."""
    ids_BS, targets = domain.text.batch(sequences)
    length = int((targets[0] != IGNORED_TARGET).sum())  # padding is not routed, and takes no expert's room
    targets_BS = torch.from_numpy(targets[:, :length]).to(device)
    output = model(make_tokens(ids_BS[:, :length], sequences, 0, plan.end_of_document, device))
    losses_T = token_cross_entropy(output.logits_BSV.flatten(0, 1), targets_BS.flatten())
    losses_B = losses_T.view(targets_BS.shape).double().sum(1)
    if output.sums is None:
        return losses_B, None
    return losses_B, torch.stack((output.sums.counts, output.sums.dropped))
