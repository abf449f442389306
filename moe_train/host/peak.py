"""Peak operations per second of a device: from a table for known GPUs, otherwise measured."""

import statistics
import time

import torch

from moe_train.host.precision import Precision, torch_dtype
from moe_train.ops.products import mm

# Dense matrix products in bf16 and fp16, operations per second, from NVIDIA's and AMD's data sheets. The first entry
# counts whose words are all in the name: a card has fewer units, or less power, than a module of the same generation.
_PUBLISHED = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 9.89e14,
    "H200 NVL": 8.35e14,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.89e14,
    "H800 PCIe": 7.56e14,
    "H800": 9.89e14,
    "H20": 1.48e14,
    "A100": 3.12e14,
    "A800": 3.12e14,
    "L40S": 3.62e14,
    "MI300X": 1.307e15,
    "MI325X": 1.307e15,
}
# Sizes of the multiplied matrices: larger ones come closer to the peak.
_SIZES = {"cpu": (256, 512, 1024, 4096), "cuda": (1024, 4096, 8192, 16384)}
_LONG_SECONDS = 0.01  # a product that takes this long is large enough
_ROUNDS = 5


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Return the peak operations per second of this rank's device in matrix products.

    For a known GPU in 16 bits it is the published peak. In fp32, on a CPU and on other devices, it is what a large
    product reaches now, with this rank's threads and the other processes on the host.

    Args:
        device: Device of this rank.
        precision: Precision of the products.
    """
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        words = set(name.replace("-", " ").replace("_", " ").split())  # NVIDIA A100-SXM4-80GB
        for known, flops in _PUBLISHED.items():
            if words.issuperset(known.split()):
                return flops
    return _measured(device, torch_dtype(precision))


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    for size in _SIZES[device.type]:
        # Random: a GPU draws less power for equal numbers, and keeps a clock that it does not have in training.
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        _seconds_of_product(a, b)  # the first run sets up
        if _seconds_of_product(a, b) >= _LONG_SECONDS:
            break
    return 2 * size**3 / statistics.median(_seconds_of_product(a, b) for _ in range(_ROUNDS))


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    began = time.perf_counter()
    mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - began
