"""Micro-batches of this rank: its part of every global batch.

A step takes the next global_batch_size sequences of the run; inside a step, micro-step m takes the next
micro_batch_size x ranks sequences, and rank r the r-th run of micro_batch_size among them. So the tokens of a
micro-step do not depend on how many ranks share it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_train.data import TrainingSequences, document_ids
from moe_train.distributed.collectives import all_reduce_sum, world_group
from moe_train.model.step_size import StepSize
from moe_train.model.token_index import starts_of_documents
from moe_train.model.transformer import Tokens
from moe_train.train.progress import Progress


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of a batch and this rank's place in it.

    Attributes:
        micro_batch_size: Sequences of one rank in one micro-step.
        global_batch_size: Sequences of one step, over all ranks.
        rank: Rank of this process.
        world_size: Number of ranks.
        copies: Copies of every token that routers see, the original included.
    """

    micro_batch_size: int
    global_batch_size: int
    rank: int
    world_size: int
    copies: int = 1

    @property
    def num_micro_steps(self) -> int:
        """Number of micro-steps of one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def step_size(self, sequence_length: int, num_targets: int | None = None) -> StepSize:
        """Sizes of a step; num_targets None: every token has a target."""
        tokens = self.global_batch_size * sequence_length
        targets = tokens if num_targets is None else num_targets
        return StepSize(self.num_micro_steps * self.world_size, tokens * self.copies, targets)

    def indices(self, first_sequence: int, micro_step: int) -> np.ndarray:
        """Compute the global indices of this rank's sequences in a micro-step. int64 [micro_batch_size].

        Args:
            first_sequence: Global index of the first sequence of the step.
            micro_step: Number of the micro-step in the step, from 0.
        """
        start = first_sequence + (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size, dtype=np.int64)


def make_tokens(
    ids_BS: np.ndarray, sequences_B: np.ndarray, step: int, end_of_document: int | None, device: torch.device
) -> Tokens:
    """Make the model input from token ids.

    Args:
        ids_BS: Token ids.
        sequences_B: Global index of each sequence.
        step: Optimizer step.
        end_of_document: Token that separates packed documents, to isolate them; None: they are not isolated.
        device: Device of the model.
    """
    documents_BS, starts = None, None
    if end_of_document is not None:
        documents = torch.from_numpy(document_ids(ids_BS, end_of_document))
        documents_BS, starts = documents.to(device), starts_of_documents(documents)  # on the host: nothing waits
    return Tokens(
        torch.from_numpy(np.ascontiguousarray(ids_BS)).to(device),
        torch.from_numpy(sequences_B).to(device),
        step,
        documents_BS=documents_BS,
        document_starts=starts,
    )


def micro_batches(
    sequences: TrainingSequences,
    plan: BatchPlan,
    progress: Progress,
    end_of_document: int | None,
    device: torch.device,
) -> Iterator[tuple[Tokens, Tensor]]:
    """Yield this rank's micro-batches of a step: tokens and the next tokens to predict.

    Args:
        sequences: Training sequences.
        plan: Sizes of a batch and this rank's place in it.
        progress: Progress before the step.
        end_of_document: Token that separates packed documents, to isolate them; None: they are not isolated.
        device: Device of the model.
    """
    for micro_step in range(plan.num_micro_steps):
        indices = plan.indices(progress.consumed_sequences, micro_step)
        ids_BS, targets = sequences.inputs_and_targets(indices)
        targets_BS = torch.from_numpy(np.ascontiguousarray(targets)).to(device)
        yield make_tokens(ids_BS, indices, progress.step, end_of_document, device), targets_BS


def size_of_step(sequences: TrainingSequences, plan: BatchPlan, progress: Progress) -> StepSize:
    """Find the sizes of a step over all ranks, before its first pass.

    Args:
        sequences: Training data.
        plan: Sizes and rank.
        progress: Progress before the step.

    Collective: All ranks, if the data ignores targets.
    """
    if not sequences.ignores_targets:
        return plan.step_size(sequences.sequence_length)
    mine = (plan.indices(progress.consumed_sequences, micro_step) for micro_step in range(plan.num_micro_steps))
    # fp64 holds whole numbers of this size exactly.
    own = torch.tensor(float(sum(sequences.num_targets(indices) for indices in mine)), dtype=torch.float64)
    return plan.step_size(sequences.sequence_length, int(all_reduce_sum(own, world_group())))
