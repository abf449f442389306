"""Where Triton kernels stand in for PyTorch's operations: the one place that decides, and the one that imports them.

PyTorch's operations are the reference: they run on CPU, for the dtypes that the kernels have not, and without Triton.
"""

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FIRST_CAPABILITY = (8, 0)  # Triton supports NVIDIA GPUs from compute capability 8.0


def can_run(tensor: Tensor) -> bool:
    """Whether the kernels take a tensor: on a CUDA device that Triton supports, of a dtype of DTYPES."""
    if tensor.device.type != "cuda" or tensor.dtype not in DTYPES or not _has_triton():
        return False
    return torch.cuda.get_device_capability(tensor.device) >= _FIRST_CAPABILITY


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """moe_train.ops.triton_kernels where it can run on all of the tensors, else None."""
    if not all(can_run(tensor) for tensor in tensors):
        return None
    from moe_train.ops import triton_kernels  # brings Triton, which other devices do without

    return triton_kernels


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None  # it comes with the CUDA builds of torch
