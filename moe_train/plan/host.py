"""What ZeRO-Offload keeps in the memory of a node's host, and copies between it and a device (deepspeed 0.19.8).

Master weights, the optimizer's states and the averaged fp32 gradient of a rank's partition are in host memory, where
the cores make the update. Stages 1 and 2 have buffers of the working weights and of the largest tensor beside them;
stage 3 has the sums of gradients there too. What travels is in pinned memory, whose blocks torch (2.13) rounds up to
powers of two.
"""

from dataclasses import dataclass

from moe_train.plan.layout import Layout
from moe_train.plan.rates import Rates
from moe_train.plan.states import ModelStates

HOST_PARTS = ("optimizer_states", "gradients", "zero_buffers", "checkpoint")
_FP32 = 4
# Bytes per element that the update reads and writes: parameter and gradient; clipping. And of a moment.
_UPDATE_BYTES, _CLIP_BYTES, _MOMENT_BYTES = 12, 8, 8


@dataclass(frozen=True)
class Copies:
    """Bytes between the device of a rank and its host, per step.

    Attributes:
        to_host: Bytes of gradients.
        to_device: Bytes of working weights, and of sums of gradients that the device adds to.
    """

    to_host: float
    to_device: float


def host_parts(states: ModelStates, layout: Layout, device: str) -> dict[str, float]:
    """Compute the bytes that one rank takes of its host's memory, by name of HOST_PARTS.

    Args:
        states: Model states of the rank.
        layout: Layout of the run.
        device: Device type. On a cpu nothing is pinned, and checkpoints are not counted: the copy for a checkpoint is
            made between two steps.
    """
    parts = dict.fromkeys(HOST_PARTS, 0.0)
    is_cuda = device == "cuda"
    if is_cuda:
        # The snapshot of a save. Without offload it is one pinned block.
        parts["checkpoint"] = float(states.optimizer_states if layout.offloads else _pinned(states.optimizer_states))
    if not layout.offloads:
        return parts

    def held(num_bytes: int) -> int:
        return _pinned(num_bytes) if is_cuda else num_bytes

    own, partitions = states.partition_elements, [group.partition for group in states.groups]
    gradients = sum(held(_FP32 * partition) for partition in partitions)
    if layout.zero_stage == 3:
        parts["optimizer_states"] = float(states.optimizer_states)
        parts["gradients"] = float(gradients + held(layout.gradient_bytes * own))
        return parts
    parts["optimizer_states"] = float(
        states.optimizer_states + sum(held(_FP32 * partition) - _FP32 * partition for partition in partitions)
    )
    parts["gradients"] = float(gradients + (held(_FP32 * own) if _adds_on_host(layout) else 0))
    working = sum(held(layout.dtype_bytes * partition) for partition in partitions)
    parts["zero_buffers"] = float(working + held(layout.dtype_bytes * largest_tensor(states)))
    return parts


def largest_tensor(states: ModelStates) -> int:
    """Number of elements of the largest tensor of a rank before ZeRO."""
    return max(group.largest for group in states.groups)


def host_copies(states: ModelStates, layout: Layout) -> Copies:
    """Compute the bytes that travel between device and host in a step.

    Args:
        states: Model states of the rank.
        layout: Layout of the run.
    """
    if not layout.offloads:
        return Copies(0.0, 0.0)
    own, size, passes = states.partition_elements, layout.gradient_bytes, layout.accumulation
    to_host, to_device = _FP32 * own, layout.dtype_bytes * own
    if layout.zero_stage == 3:  # sums are kept on the host, and added to on the device
        to_host, to_device = to_host + size * own * passes, to_device + size * own * passes
    elif _adds_on_host(layout):
        to_host, to_device = to_host + _FP32 * own * passes, to_device + _FP32 * own * (passes - 1)
    return Copies(float(to_host), float(to_device))


def copy_seconds(states: ModelStates, layout: Layout, rates: Rates) -> float:
    """Compute the seconds of these copies in a step. They are in one stream with the other work of the device.

    Args:
        states: Model states of the rank.
        layout: Layout of the run.
        rates: Speed of the machine; its host is known.
    """
    copies = host_copies(states, layout)
    num_bytes = copies.to_host + copies.to_device
    if not num_bytes:
        return 0.0
    if rates.is_cpu:  # within one memory: read and written. What would go back to a device stays.
        return rates.moving(2 * (copies.to_host + 2 * layout.dtype_bytes * states.partition_elements))
    assert rates.machine.host is not None, "the layout was checked"
    return num_bytes / rates.machine.host.link_bytes_per_second


def update_seconds(states: ModelStates, layout: Layout, rates: Rates) -> float:
    """Compute the seconds in which the cores of a rank make the update of an offloaded step.

    Args:
        states: Model states of the rank.
        layout: Layout of the run.
        rates: Speed of the machine; its host is known.
    """
    per_element = _UPDATE_BYTES + _CLIP_BYTES + _FP32 + layout.dtype_bytes
    moved = per_element * states.partition_elements + _MOMENT_BYTES * states.moment_elements
    if rates.is_cpu:
        return rates.moving(moved)
    assert rates.machine.host is not None, "the layout was checked"
    return moved / rates.machine.host.memory_bytes_per_second


def _adds_on_host(layout: Layout) -> bool:
    """Whether stage 2 keeps the sums of several passes on the host: it does if they are as wide as the weights."""
    return layout.zero_stage == 2 and layout.accumulation > 1 and layout.dtype_bytes == _FP32


def _pinned(num_bytes: int) -> int:
    return 1 << max(0, num_bytes - 1).bit_length()
