"""Numbers of the device that the host needs, brought to it while the device goes on."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Small tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Start the copy.

        Args:
            tensors: Of one device and dtype.
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
        """Each tensor's numbers, as nested lists.

        Host synchronisation: waits for what was queued before the copy, not for what was queued after it.
        """
        if self._event is not None:
            self._event.synchronize()
        numbers = iter(self._numbers.tolist())
        return [_nested(numbers, shape) for shape in self._shapes]


def _nested(numbers: Iterator[Any], shape: Sequence[int]) -> Any:
    """The next numbers as lists of a shape."""
    if not shape:
        return next(numbers)
    return [_nested(numbers, shape[1:]) for _ in range(shape[0])]
