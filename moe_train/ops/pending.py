"""What was started and is waited for later, and a copy to the host as one such thing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Arrived = TypeVar("Arrived")


@dataclass(frozen=True)
class Pending(Generic[Arrived]):
    """What was started and has not been waited for, like an asynchronous operation of torch.distributed.

    Attributes:
        finish: Function that waits, and returns what arrived.
    """

    finish: Callable[[], Arrived]

    def wait(self) -> Arrived:
        """Wait, and return what arrived. Call it once."""
        return self.finish()


def start_host_copy(tensors: Sequence[Tensor]) -> Pending[list[Any]]:
    """Start to copy small tensors to the host, while the device continues to work.

    Args:
        tensors: Tensors of the same device and dtype.

    Returns:
        Pending numbers of each tensor, as nested lists. Host synchronisation: `wait` waits for the work queued before
        the copy, not for the work queued after it.
    """
    shapes, event = [tensor.shape for tensor in tensors], None
    numbers = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if numbers.device.type == "cuda":
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        numbers = on_host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

    def finish() -> list[Any]:
        if event is not None:
            event.synchronize()
        found = iter(numbers.tolist())
        return [_nested(found, shape) for shape in shapes]

    return Pending(finish)


def _nested(numbers: Iterator[Any], shape: Sequence[int]) -> Any:
    """Take the next numbers and nest them in lists of a shape."""
    if not shape:
        return next(numbers)
    return [_nested(numbers, shape[1:]) for _ in range(shape[0])]
