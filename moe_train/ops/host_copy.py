"""Copy of small tensors from the device to the host, while the device continues to work."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Small tensors whose copy to the host is under way."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Start the copy.

        Args:
            tensors: Tensors of the same device and dtype.
        """
        self._shapes = [tensor.shape for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        self._numbers = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if self._numbers.device.type == "cuda":
            on_host = torch.empty(self._numbers.shape, dtype=self._numbers.dtype, pin_memory=True)
            self._numbers = on_host.copy_(self._numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Any]:
        """Return the numbers of each tensor, as nested lists.

        Host synchronisation: it waits for the work queued before the copy, not for the work queued after it.
        """
        if self._event is not None:
            self._event.synchronize()
        numbers = iter(self._numbers.tolist())
        return [_nested(numbers, shape) for shape in self._shapes]


def _nested(numbers: Iterator[Any], shape: Sequence[int]) -> Any:
    """Take the next numbers and nest them in lists of a shape."""
    if not shape:
        return next(numbers)
    return [_nested(numbers, shape[1:]) for _ in range(shape[0])]
