"""Precision of training: which one a device supports, and its dtype."""

from typing import TYPE_CHECKING, Literal

from moe_train.config.errors import UsageError

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "fp16", "fp32"]


def resolve_precision(setting: Literal["auto", "bf16", "fp16", "fp32"], device: "torch.device") -> Precision:
    """Choose the precision of training.

    Args:
        setting: train.precision; auto: bf16 if the device multiplies matrices in bf16, otherwise fp32.
        device: Device of this rank; all ranks are assumed to have the same kind of device.

    Raises:
        UsageError: If the device cannot train in the precision.
    """
    if setting == "fp16" and device.type == "cpu":
        raise UsageError("train.precision (fp16) needs parallel.device cuda: on a CPU it is bf16 or fp32")
    return setting if setting != "auto" else ("bf16" if _has_bf16(device) else "fp32")


def _has_bf16(device: "torch.device") -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Without these instructions, a CPU emulates bf16 and is slower than in fp32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def torch_dtype(precision: Precision) -> "torch.dtype":
    """Return the dtype of the working weights and activations."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
