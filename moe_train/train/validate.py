"""Validation: the loss on the held-out text, and how the experts share it when routers draw no noise.

Legend: L MoE layers, V vocab_size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_train.data import HeldOut
from moe_train.distributed.collectives import all_reduce_sum, world_group
from moe_train.model.moe.expert_information import ChoiceCounts, TokenClasses, expert_information
from moe_train.ops.cross_entropy import IGNORED_TARGET
from moe_train.train.batches import BatchPlan, make_tokens, own_targets
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.telemetry.load_metrics import max_violation
from moe_train.train.telemetry.records import Record, by_layer


@dataclass(frozen=True)
class ValidationResult:
    """Loss over held-out sequences.

    Attributes:
        cross_entropy: Mean cross-entropy, in nats per token.
        bits_per_byte: cross_entropy / ln 2 x tokens / bytes of the held-out text; None where decoding the tokens does
            not give the text back, because the model then predicts another, shorter text.
        num_tokens: Number of predicted tokens.
        max_violation_L: MaxVio of each MoE layer, without noise; empty: experts were not measured.
        expert_information_L: Share of each layer's choice that the token's id explains; empty as above.
    """

    cross_entropy: float
    bits_per_byte: float | None
    num_tokens: int
    max_violation_L: tuple[float, ...] = ()
    expert_information_L: tuple[float, ...] = ()

    def figures(self, layers: Sequence[int]) -> Record:
        """Return the figures for a record: val/cross_entropy, val/bits_per_byte, those of each layer, and

        val/max_violation of the worst layer and the mean val/expert_information.

        Args:
            layers: Index in the model of each MoE layer.
        """
        record: Record = {"val/cross_entropy": self.cross_entropy}
        if self.bits_per_byte is not None:
            record["val/bits_per_byte"] = self.bits_per_byte
        if self.max_violation_L:
            mean = sum(self.expert_information_L) / len(self.expert_information_L)
            record |= {"val/max_violation": max(self.max_violation_L), "val/expert_information": mean}
            record |= by_layer("val/max_violation", self.max_violation_L, layers)
            record |= by_layer("val/expert_information", self.expert_information_L, layers)
        return record


def validate(
    engine: TrainEngine,
    held_out: HeldOut,
    plan: BatchPlan,
    num_sequences: int | None,
    end_of_document: int | None,
    device: torch.device,
    watching: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    measures: bool = False,
) -> ValidationResult:
    """Compute the held-out loss without router noise; it is the same for any number of ranks.

    Args:
        engine: Engine with the model.
        held_out: Held-out sequences.
        plan: Sequences of a forward pass, and ranks that share them.
        num_sequences: Number of sequences, evenly spread over the text; None: all.
        end_of_document: Token that separates packed documents, to isolate them; None: they are not isolated.
        device: Device of this rank.
        watching: Function that makes the context in which a batch is evaluated, from a name of the batch.
        measures: Whether to measure the experts too, if there are any.

    Collective: All ranks.
    """
    available = held_out.num_sequences
    wanted = available if num_sequences is None else min(num_sequences, available)
    chosen = np.arange(wanted, dtype=np.int64) * available // wanted
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model, choices = engine.model, None
    if measures and model.routers:
        counts_V = torch.from_numpy(held_out.count_inputs(chosen, model.embedding.num_embeddings)).to(device)
        choices = ChoiceCounts(model.routers, TokenClasses.of(counts_V, model.routers[0].top_k))
    for start in range(0, wanted, plan.stride):
        places = start + plan.reader * plan.micro_batch_size + np.arange(plan.micro_batch_size)
        # A rank without sequences of its own takes rows of padding: the others' tokens may need its experts.
        indices = np.where(places < wanted, chosen[np.minimum(places, wanted - 1)], available)
        ids_BS, targets = held_out.batch(indices)
        targets_BS = own_targets(targets, plan.context, device)
        with watching(f"validation from sequence {start}"):
            tokens = make_tokens(ids_BS, indices, 0, end_of_document, device, plan.context)
            is_counted_BS = targets_BS != IGNORED_TARGET
            with choices.counting(tokens.ids_BS, is_counted_BS) if choices is not None else nullcontext():
                sums[0] += engine.evaluate(tokens, targets_BS).flatten().double().sum()
            sums[1] += is_counted_BS.sum()
    total, count = all_reduce_sum(sums, world_group()).tolist()
    mean = total / count
    result = ValidationResult(mean, held_out.bits_per_byte(mean), int(count))
    if choices is None:
        return result
    joint_LCE = choices.reduced(world_group())
    violation_L = max_violation(joint_LCE.sum(1).double())
    information_L = expert_information(joint_LCE, model.routers[0].top_k)
    return replace(
        result, max_violation_L=tuple(violation_L.tolist()), expert_information_L=tuple(information_L.tolist())
    )
