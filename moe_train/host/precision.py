"""Precision of a device: which arithmetic it has, and the dtypes."""

from typing import TYPE_CHECKING, Literal

from moe_train.config.resolve import Device, Precision, choose_precision

if TYPE_CHECKING:
    import torch


def describe_device(device: "torch.device") -> Device:
    """Describe a device as far as a configuration depends on it."""
    return Device(device.type, _has_bf16(device))


def resolve_precision(setting: Precision | Literal["auto"], device: "torch.device") -> Precision:
    """Choose the precision of a device; auto: bf16 if it multiplies matrices in bf16, otherwise fp32.

    Raises:
        UsageError: If the device cannot train in the precision.
    """
    return choose_precision(setting, describe_device(device))


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
