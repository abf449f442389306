"""Snapshot of a rank's state in host memory: training can continue while it is written to a file."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.checkpoint.sharded_state import ShardedState


@dataclass(frozen=True)
class Snapshot:
    """State of this rank at one step.

    Attributes:
        tensors: Values by "kind/name", fp32, 1-D, on the CPU; valid until the next snapshot uses the same memory.
        ranges: Start and length of this rank's range of each logical tensor.
        shapes: Global shape of each of these tensors.
        optimizer_step: Number of Adam's updates.
        loss_scale: Loss scale of fp16; 1 in another precision.
        buffers: Values of the model's buffers, the same on every rank.
        moments: Names of the optimizer's state tensors.
        tensor_moments: Those of the tensors that have not all of them, by the tensor's name.
    """

    tensors: dict[str, Tensor]
    ranges: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]
    optimizer_step: int
    loss_scale: float
    buffers: dict[str, list[float]]
    moments: tuple[str, ...]
    tensor_moments: dict[str, tuple[str, ...]]


class HostMemory:
    """Host memory for one snapshot, used again for the next: first touches of new memory take longer than the copy."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._is_pinned = False

    def take(self, state: ShardedState) -> Snapshot:
        """Copy this rank's state. The previous snapshot must be written by now.

        Args:
            state: Training state to copy.
        """
        fragments, kinds = list(state.fragments()), ("weight", *state.moments)
        needed = sum(len(fragment.states) * fragment.numel for fragment in fragments)
        if self._memory is None or self._memory.numel() < needed:
            self._unpin()
            self._memory = torch.empty(needed, dtype=torch.float32)
            if fragments and fragments[0].states["weight"].is_cuda:
                self._pin(self._memory)
        tensors: dict[str, Tensor] = {}
        place = 0
        for kind in kinds:
            for fragment in fragments:
                if kind not in fragment.states:
                    continue
                copy = self._memory[place : place + fragment.numel]
                copy.copy_(fragment.states[kind], non_blocking=True)
                tensors[f"{kind}/{fragment.tensor.name}"] = copy
                place += fragment.numel
        buffers = {name: buffer.tolist() for name, buffer in state.buffers().items()}
        if self._is_pinned:
            torch.cuda.synchronize()  # the copies must hold the state of this step, before training changes it
        return Snapshot(
            tensors=tensors,
            ranges={fragment.tensor.name: (fragment.start, fragment.numel) for fragment in fragments},
            shapes={fragment.tensor.name: fragment.tensor.shape for fragment in fragments},
            optimizer_step=state.optimizer_step,
            loss_scale=state.loss_scale,
            buffers=buffers,
            moments=state.moments,
            tensor_moments={
                fragment.tensor.name: tuple(name for name in state.moments if name in fragment.states)
                for fragment in fragments
                if len(fragment.states) < len(kinds)
            },
        )

    def _pin(self, memory: Tensor) -> None:
        """Pin memory that exists, so that copies from a CUDA device run without the host.

        torch's own pinned memory has the size of the next power of two: up to twice that of the state.
        """
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        self._is_pinned = code == 0  # otherwise, as where too little memory may be locked, the copies are slower

    def _unpin(self) -> None:
        if self._memory is not None and self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._is_pinned = False
