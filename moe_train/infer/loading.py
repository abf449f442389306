"""A checkpoint's weights into a model for inference: no optimizer, no ZeRO, this rank's experts only."""

import torch
from torch import Tensor

from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.matching import check_same_buffers, check_same_model
from moe_train.checkpoint.ranges import RangeReader
from moe_train.model.parameters import InitialValue, LogicalTensor, allocate, logical_tensors
from moe_train.model.transformer import Transformer

_CHUNK = 1 << 24  # elements read at once: bounds the copy in fp32


def check_fits(model: Transformer, manifest: Manifest) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        UsageError: Naming the tensor that differs.
    """
    check_same_model(manifest, {name: tensor.shape for name, tensor in logical_tensors(model).items()})
    check_same_buffers(manifest, {name: buffer.numel() for name, buffer in model.named_buffers()})


def load_weights(model: Transformer, manifest: Manifest, *, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on the meta device a checkpoint's weights and buffers, whatever layout wrote it.

    Args:
        model: One that the checkpoint fits, holding this rank's experts.
        manifest: Of the checkpoint.
        dtype: Of the weights.
        device: Where they are to be.

    Raises:
        DamagedCheckpoint: If a file cannot be read.
    """
    with RangeReader(manifest) as reader:

        def fill(data: Tensor, place: LogicalTensor, initial: InitialValue) -> None:
            del initial
            flat = data.view(-1)
            for start in range(0, place.numel, _CHUNK):
                end = min(start + _CHUNK, place.numel)
                flat[start:end] = reader.read(place.name, "weight", place.start + start, place.start + end)

        allocate(model, fill, dtype=dtype, device=device)
    buffers = dict(model.named_buffers())
    for name, values in manifest.buffers.items():
        buffers[name].copy_(torch.tensor(values, dtype=torch.float64))
