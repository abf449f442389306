"""Loading of a checkpoint's weights into a model for inference: no optimizer, no ZeRO, only this rank's experts."""

import torch
from torch import Tensor

from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.matching import check_same_buffers, check_same_model
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.reader import load_buffers
from moe_train.model.parameters import InitialValue, LogicalTensor, allocate, logical_tensors
from moe_train.model.transformer import Transformer

_CHUNK = 1 << 24  # elements read at once; bounds the fp32 copy


def check_fits(model: Transformer, manifest: Manifest) -> None:
    """Check that a checkpoint has the tensors and buffers of a model.

    Args:
        model: Model that is to be loaded.
        manifest: Manifest of the checkpoint.

    Raises:
        UsageError: If a tensor or buffer differs. The message names it.
    """
    check_same_model(manifest, {name: tensor.shape for name, tensor in logical_tensors(model).items()})
    check_same_buffers(manifest, {name: buffer.numel() for name, buffer in model.named_buffers()})


def load_weights(model: Transformer, manifest: Manifest, *, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate a model that is on the meta device, and load its weights and buffers from a checkpoint of any layout.

    Args:
        model: Model that fits the checkpoint, with the experts of this rank.
        manifest: Manifest of the checkpoint.
        dtype: dtype of the weights.
        device: Device of the weights.

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
    load_buffers(dict(model.named_buffers()), manifest)
