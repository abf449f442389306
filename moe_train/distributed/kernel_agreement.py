"""Agreement of all ranks on Triton's kernels: all take them, or all compute the same with PyTorch operations.

Triton builds a launcher in C when a kernel first runs. Without a compiler or Python's headers this fails, on one host
perhaps and not on another; in the middle of a step the other ranks would wait for the one that failed.
"""

from collections.abc import Callable

import torch

from moe_train.distributed.consensus import try_on_all_ranks
from moe_train.ops.kernels import forbid_kernels, try_kernel


def agree_on_kernels(device: torch.device, warn: Callable[[str], object]) -> bool:
    """Run a small kernel on every rank's GPU; if it fails on one, no rank uses kernels from now on.

    Args:
        device: Device of this rank; the devices of all ranks are alike.
        warn: Called with a message on every rank if the kernels cannot run.

    Returns:
        Whether kernels may be used; True on the CPU, where nothing asks for them.

    Collective: All ranks, on CUDA.
    """
    if device.type != "cuda":
        return True
    failure = try_on_all_ranks(lambda: try_kernel(device)).failure
    if failure is None:
        return True
    forbid_kernels()
    reason = failure.message.strip().splitlines()[0]
    warn(
        f"warning: Triton's kernels do not run on rank {failure.rank} ({reason}): all ranks take PyTorch's, which are "
        "slower; they need triton, a C compiler and Python.h (Debian and Ubuntu: apt install gcc python3-dev)"
    )
    return False
