"""Choice between Triton kernels and PyTorch operations: the only place that decides, and that imports the kernels.

PyTorch operations are the reference. They run on CPU, without Triton, and for dtypes that the kernels do not support.
"""

import functools
import importlib.util
import threading
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FIRST_CAPABILITY = (8, 0)  # Triton supports NVIDIA GPUs from compute capability 8.0
_forbidden = threading.Event()  # of this process, as torch's own settings are: set once, before the first step


def can_run(tensor: Tensor) -> bool:
    """Return whether the kernels take a tensor: it is on a CUDA device that Triton supports, with a dtype of DTYPES."""
    if tensor.device.type != "cuda" or tensor.dtype not in DTYPES or _forbidden.is_set() or not _has_triton():
        return False
    return torch.cuda.get_device_capability(tensor.device) >= _FIRST_CAPABILITY


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """Return the module moe_train.ops.triton_kernels if its kernels take all of the tensors, else None."""
    if not all(can_run(tensor) for tensor in tensors):
        return None
    from moe_train.ops import triton_kernels  # imports Triton, which other devices do not need

    return triton_kernels


def token_kernels_for(*tensors: Tensor) -> ModuleType | None:
    """Return the module moe_train.ops.triton_tokens if its kernels take all of the tensors, else None.

    In code that torch compiles they are not taken: the compiler makes such kernels itself.
    """
    if torch.compiler.is_compiling() or not all(can_run(tensor) for tensor in tensors):
        return None
    from moe_train.ops import triton_tokens

    return triton_tokens


def linear_scan_kernels_for(q_BnHbf: Tensor) -> ModuleType | None:
    """Return the module moe_train.ops.triton_ttt if it takes such queries: fp32, within its limits; else None."""
    if q_BnHbf.dtype != torch.float32 or not can_run(q_BnHbf):
        return None
    from moe_train.ops import triton_ttt

    size, width = q_BnHbf.shape[-2:]
    return triton_ttt if size <= triton_ttt.MAX_MINI_BATCH and width <= triton_ttt.MAX_HEAD_SIZE else None


def try_kernel(device: torch.device) -> None:
    """Compile and run a small kernel, if kernels are for this device at all.

    Args:
        device: CUDA device.

    Raises:
        Exception: Whatever Triton raises if it cannot: without a C compiler or Python.h, CalledProcessError.
    """
    rows = torch.zeros(1, 16, device=device)
    if kernels := kernels_for(rows):
        kernels.gather_rows(rows, torch.zeros(1, dtype=torch.int64, device=device))


def forbid_kernels() -> None:
    """Let PyTorch operations compute everything from now on, in this process."""
    _forbidden.set()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None  # it comes with the CUDA builds of torch
