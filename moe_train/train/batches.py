"""Micro-batches of this rank: its part of every global batch.

A step takes the next global_batch_size sequences of the run; inside a step, micro-step m takes the next
micro_batch_size x ranks sequences, and rank r the r-th run of micro_batch_size among them. So the tokens of a
micro-step do not depend on how many ranks share it. Where P ranks share sequences, they count as one here: all of them
read the same sequences, form targets, documents and offsets on whole rows, and then take their columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moe_train.data import TrainingSequences, document_ids
from moe_train.distributed.collectives import all_reduce_sum, world_group
from moe_train.distributed.context import ContextRanks, ContextShard
from moe_train.model.step_size import StepSize
from moe_train.model.token_index import document_offsets, starts_of_documents
from moe_train.model.transformer import Tokens
from moe_train.ops.ring_attention import Reach
from moe_train.train.progress import Progress


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of a batch and this rank's place in it.

    Attributes:
        micro_batch_size: Sequences of one rank, or of ranks that share sequences, in one micro-step.
        global_batch_size: Sequences of one step, over all ranks.
        rank: Rank of this process.
        world_size: Number of ranks.
        copies: Copies of every token that routers see, the original included.
        context: Ranks that share this rank's sequences; None: it has whole sequences.
    """

    micro_batch_size: int
    global_batch_size: int
    rank: int
    world_size: int
    copies: int = 1
    context: ContextRanks | None = None

    @property
    def context_size(self) -> int:
        """Number of ranks that share a sequence."""
        return 1 if self.context is None else self.context.size

    @property
    def reader(self) -> int:
        """Number of this rank, or of the ranks that share its sequences, among those with other sequences."""
        return self.rank // self.context_size

    @property
    def stride(self) -> int:
        """Sequences of one micro-step, over all ranks."""
        return self.micro_batch_size * (self.world_size // self.context_size)

    @property
    def num_micro_steps(self) -> int:
        """Number of micro-steps of one optimizer step."""
        return self.global_batch_size // self.stride

    def step_size(self, sequence_length: int, num_targets: int | None = None) -> StepSize:
        """Sizes of a step; num_targets None: every token has a target."""
        tokens = self.global_batch_size * sequence_length
        targets = tokens if num_targets is None else num_targets
        return StepSize(self.num_micro_steps * self.world_size, tokens * self.copies, targets)  # parts of all ranks

    def indices(self, first_sequence: int, micro_step: int) -> np.ndarray:
        """Compute the global indices of this rank's sequences in a micro-step. int64 [micro_batch_size].

        Args:
            first_sequence: Global index of the first sequence of the step.
            micro_step: Number of the micro-step in the step, from 0.
        """
        start = first_sequence + micro_step * self.stride + self.reader * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size, dtype=np.int64)


def make_tokens(
    ids_BS: np.ndarray,
    sequences_B: np.ndarray,
    step: int,
    end_of_document: int | None,
    device: torch.device,
    context: ContextRanks | None = None,
) -> Tokens:
    """Make the model input from token ids.

    Args:
        ids_BS: Token ids of whole rows.
        sequences_B: Global index of each sequence.
        step: Optimizer step.
        end_of_document: Token that separates packed documents, to isolate them; None: they are not isolated.
        device: Device of the model.
        context: Ranks that share the rows: the tokens are this rank's columns. None: they are whole rows.
    """
    documents_BS = None if end_of_document is None else torch.from_numpy(document_ids(ids_BS, end_of_document))
    whole = Tokens(
        _send(torch.from_numpy(np.ascontiguousarray(ids_BS)), device),
        _send(torch.from_numpy(sequences_B), device),
        step,
        documents_BS=None if documents_BS is None else _send(documents_BS, device),
        document_starts=None if documents_BS is None else starts_of_documents(documents_BS),  # on the host: no wait
    )
    return whole if context is None else _own_part(whole, documents_BS, context)


def _send(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device. From pinned memory the host need not wait for what the device still does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _own_part(whole: Tokens, documents_BS: Tensor | None, context: ContextRanks) -> Tokens:
    """Take this rank's columns of whole rows; `documents_BS` are their documents on the host."""
    length, device = whole.ids_BS.shape[1], whole.ids_BS.device
    columns = torch.from_numpy(context.columns(length))
    positions_1S, offsets_BS, reach = columns.unsqueeze(0), None, None
    if documents_BS is not None:
        offsets_BS = document_offsets(documents_BS)
        reach = Reach.of(offsets_BS.numpy())  # on the host, so that attention asks the device nothing

    def own(x_BS: Tensor) -> Tensor:
        return _send(x_BS[:, columns], device) if x_BS.device.type == "cpu" else x_BS[:, _send(columns, device)]

    return replace(
        whole,
        ids_BS=own(whole.ids_BS),
        positions_BS=_send(positions_1S, device),
        documents_BS=None if documents_BS is None else own(documents_BS),
        offsets_BS=_send(positions_1S, device) if offsets_BS is None else own(offsets_BS),
        document_starts=None,  # they are of whole rows
        shard=ContextShard(context, length, whole.documents_BS, reach),
    )


def own_targets(targets_BS: np.ndarray, context: ContextRanks | None, device: torch.device) -> Tensor:
    """Take this rank's columns of the targets of whole rows; all of them, if it has whole rows."""
    mine_BS = targets_BS if context is None else targets_BS[:, context.columns(targets_BS.shape[1])]
    return _send(torch.from_numpy(np.ascontiguousarray(mine_BS)), device)


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
        tokens = make_tokens(ids_BS, indices, progress.step, end_of_document, device, plan.context)
        yield tokens, own_targets(targets, plan.context, device)


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
    total = int(all_reduce_sum(own, world_group()))
    return plan.step_size(sequences.sequence_length, total // plan.context_size)  # each of its ranks counted whole rows
