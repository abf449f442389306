"""Reader from the files of a checkpoint to the training state of all ranks, whatever layout wrote the files."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.matching import check_same_buffers, check_same_model
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.sharded_state import Fragment, ShardedState
from moe_train.distributed.collectives import Group
from moe_train.distributed.consensus import run_on_all_ranks
from moe_train.model.moe.routers.last_step import is_remembered


def load_checkpoint(
    state: ShardedState, manifest: Manifest, group: Group | None = None, weights_only: bool = False
) -> None:
    """Replace the training state by a checkpoint's. Each rank reads the ranges that it owns.

    If the checkpoint is of another optimizer, moments and the number of updates start at zero.

    Args:
        state: Training state of the same model, in any layout.
        manifest: Manifest of a checkpoint whose files are verified.
        group: All ranks, with a long timeout: ranks read at different speeds. None: the default group.
        weights_only: Whether moments, the number of updates, the loss scale, and what routers remember of the last step
            start at zero in any case.

    Raises:
        UsageError: On every rank, if the model differs or a file cannot be read.

    Collective: All ranks.
    """
    check_same_model(manifest, {tensor.name: tensor.shape for tensor in state.logical_tensors})
    buffers = state.buffers()
    check_same_buffers(manifest, {name: buffer.numel() for name, buffer in buffers.items()})
    is_same_optimizer = state.optimizer == manifest.optimizer and set(state.moments) == set(manifest.moments)
    has_moments = is_same_optimizer and not weights_only
    with RangeReader(manifest) as reader:
        # If a file can no longer be read on one rank, all ranks raise before they wait for each other.
        run_on_all_ranks(
            lambda: state.read_state(lambda fragment, kind: _read_fragment(reader, fragment, kind, has_moments)),
            group=group,
        )
    had_scale = manifest.config.get("train", {}).get("precision") == "fp16" and not weights_only
    state.adopt_state(manifest.optimizer_step if has_moments else 0, manifest.loss_scale if had_scale else None)
    load_buffers(buffers, manifest)
    if weights_only:
        for name, buffer in buffers.items():
            if is_remembered(name):
                buffer.zero_()


def load_buffers(buffers: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Fill a model's buffers from a checkpoint that `check_same_buffers` accepts; one that it has not gets zeros.

    Args:
        buffers: Buffers by name.
        manifest: Manifest of the checkpoint.
    """
    for name, buffer in buffers.items():
        values = manifest.buffers.get(name)
        if values is None:
            buffer.zero_()
        else:
            buffer.copy_(torch.tensor(values, dtype=torch.float64))


def _read_fragment(reader: RangeReader, fragment: Fragment, kind: str, has_moments: bool) -> Tensor:
    if kind != "weight" and not has_moments:  # a moment of another optimizer than the checkpoint's starts at zero
        return torch.zeros(fragment.numel)
    return reader.read(fragment.tensor.name, kind, fragment.start, fragment.start + fragment.numel)
