"""From the files of a checkpoint to the state of an engine, whatever layout wrote them."""

import torch
from torch import Tensor

from moe_train.parallel.collectives import Group
from moe_train.train.agreement import together
from moe_train.train.checkpoint.manifest import Manifest
from moe_train.train.checkpoint.matching import check_same_buffers, check_same_model
from moe_train.train.checkpoint.ranges import RangeReader
from moe_train.train.engine import TrainEngine
from moe_train.train.fragments import Fragment


def load_checkpoint(engine: TrainEngine, manifest: Manifest, group: Group | None = None) -> None:
    """Replace the engine's state by a checkpoint's. Each rank reads the ranges it owns.

    Args:
        engine: Of the same model, in any layout.
        manifest: Of a checkpoint whose files are verified.
        group: Of all ranks, which may wait long: ranks read at different speeds. None: the default one.

    Raises:
        UsageError: On every rank alike, if the model differs or a file cannot be read.

    Collective: All ranks.
    """
    check_same_model(manifest, {tensor.name: tensor.shape for tensor in engine.logical_tensors})
    buffers = engine.buffers()
    check_same_buffers(manifest, {name: buffer.numel() for name, buffer in buffers.items()})
    with RangeReader(manifest) as reader:
        # A file that can no longer be read on one rank ends all, before they wait for each other.
        together(lambda: engine.read_state(lambda fragment, kind: _read_fragment(reader, fragment, kind)), group=group)
    was_fp16 = manifest.config.get("train", {}).get("precision") == "fp16"
    engine.adopt_state(manifest.optimizer_step, manifest.loss_scale if was_fp16 else None)
    for name, values in manifest.buffers.items():
        buffers[name].copy_(torch.tensor(values, dtype=torch.float64))


def _read_fragment(reader: RangeReader, fragment: Fragment, kind: str) -> Tensor:
    return reader.read(fragment.tensor.name, kind, fragment.start, fragment.start + fragment.numel)
