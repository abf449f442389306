"""Validation: the loss on the held-out text."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from moe_train.data import HeldOut
from moe_train.distributed.collectives import all_reduce_sum, world_group
from moe_train.ops.cross_entropy import IGNORED_TARGET
from moe_train.train.batches import BatchPlan, make_tokens, own_targets
from moe_train.train.engine.engine import TrainEngine


@dataclass(frozen=True)
class ValidationResult:
    """Loss over held-out sequences.

    Attributes:
        cross_entropy: Mean cross-entropy, in nats per token.
        bits_per_byte: cross_entropy / ln 2 x tokens / bytes of the held-out text; None where decoding the tokens does
            not give the text back, because the model then predicts another, shorter text.
        num_tokens: Number of predicted tokens.
    """

    cross_entropy: float
    bits_per_byte: float | None
    num_tokens: int


def validate(
    engine: TrainEngine,
    held_out: HeldOut,
    plan: BatchPlan,
    num_sequences: int | None,
    end_of_document: int | None,
    device: torch.device,
    watching: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
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

    Collective: All ranks.
    """
    available = held_out.num_sequences
    wanted = available if num_sequences is None else min(num_sequences, available)
    chosen = np.arange(wanted, dtype=np.int64) * available // wanted
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, wanted, plan.stride):
        places = start + plan.reader * plan.micro_batch_size + np.arange(plan.micro_batch_size)
        # A rank without sequences of its own takes rows of padding: the others' tokens may need its experts.
        indices = np.where(places < wanted, chosen[np.minimum(places, wanted - 1)], available)
        ids_BS, targets = held_out.batch(indices)
        targets_BS = own_targets(targets, plan.context, device)
        with watching(f"validation from sequence {start}"):
            tokens = make_tokens(ids_BS, indices, 0, end_of_document, device, plan.context)
            sums[0] += engine.evaluate(tokens, targets_BS).flatten().double().sum()
            sums[1] += (targets_BS != IGNORED_TARGET).sum()
    total, count = all_reduce_sum(sums, world_group()).tolist()
    mean = total / count
    return ValidationResult(mean, held_out.bits_per_byte(mean), int(count))
