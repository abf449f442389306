"""Speed of one rank's device while all ranks work: matrix products, memory, and small operations."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moe_train.host.precision import Precision, torch_dtype
from moe_train.ops.products import mm

ROWS = {"cpu": (16, 64, 256, 1024, 2048), "cuda": (16, 64, 256, 1024, 4096, 16384)}
WIDTHS = {"cpu": (64, 256, 1024, 2048), "cuda": (64, 256, 1024, 2048, 4096, 8192, 16384)}
_LONGEST_SECONDS = 2.0  # longer products are left out
_ROUNDS = 5
_SHORT_SECONDS = 1e-3  # shorter operations run several times in a row
_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}  # elements of an elementwise operation: far more than caches hold
_CHAIN = 200  # small operations in a row


@dataclass(frozen=True)
class Speed:
    """Measured speed of one rank's device.

    Attributes:
        products: Matrix products by precision, each as (rows, width, operations per second).
        memory_bytes_per_second: Bytes read and written per second by an elementwise sum.
        operation_seconds: Time of one small operation.
        host_memory_bytes_per_second: Bytes read and written per second by an elementwise sum on this rank's cores; None
            where the device is the CPU.
        host_link_bytes_per_second: Bytes copied per second from the device to pinned memory of the host; None where the
            device is the CPU.
    """

    products: dict[str, list[tuple[int, int, float]]]
    memory_bytes_per_second: float
    operation_seconds: float
    host_memory_bytes_per_second: float | None = None
    host_link_bytes_per_second: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def measure_speed(device: torch.device, precisions: Sequence[Precision], budget_seconds: float) -> Speed:
    """Measure this rank's device. Call it on all ranks at the same time: they share cores, memory and power.

    Args:
        device: Device of this rank.
        precisions: Precisions of the matrix products.
        budget_seconds: Time for the products of each precision.
    """
    operation = _measure_operation(device)
    memory = _measure_memory(device)
    products = {precision: measure_products(device, precision, budget_seconds) for precision in precisions}
    found = Speed({name: found for name, found in products.items() if found}, memory, operation)
    if device.type == "cpu":
        return found
    return replace(
        found,
        host_memory_bytes_per_second=_measure_memory(torch.device("cpu")),
        host_link_bytes_per_second=measure_link(device),
    )


def measure_link(device: torch.device) -> float:
    """Measure the bytes per second from this rank's device to the memory of its host, pinned where that is another."""
    given = torch.zeros(_ELEMENTS["cpu"], device=device)
    kept = torch.zeros(_ELEMENTS["cpu"], pin_memory=device.type != "cpu")
    return given.nbytes / _median_seconds(lambda: kept.copy_(given, non_blocking=True), device, 1.0)


def measure_products(device: torch.device, precision: Precision, budget_seconds: float) -> list[tuple[int, int, float]]:
    """Measure products [rows, width] x [width, width] over ROWS and WIDTHS, small ones first, until the time is over.

    Args:
        device: Device of this rank.
        precision: Precision of the products.
        budget_seconds: Time for all products.

    Returns:
        Tuples of rows, width and operations per second.
    """
    widths, row_counts = WIDTHS[device.type], ROWS[device.type]
    shapes = sorted(
        ((rows, width) for width in widths for rows in row_counts), key=lambda shape: shape[0] * shape[1] ** 2
    )
    began, found, slowest = time.perf_counter(), list[tuple[int, int, float]](), 0.0
    for rows, width in shapes:
        flops = 2 * rows * width**2
        expected = slowest * flops
        left = budget_seconds - (time.perf_counter() - began)
        if expected > _LONGEST_SECONDS or (found and 3 * expected > left):
            continue
        # Random: a GPU draws less power for equal numbers, and keeps a clock that it does not have in training.
        left_matrix, right_matrix = (
            torch.randn(height, width, device=device).to(torch_dtype(precision)) for height in (rows, width)
        )
        seconds = _median_seconds(lambda a=left_matrix, b=right_matrix: mm(a, b), device, left)  # type: ignore[misc]
        found.append((rows, width, flops / seconds))
        if flops > 2**24:  # the time of smaller products does not come from their operations
            slowest = max(slowest / 2, seconds / flops)
    return found


def _measure_memory(device: torch.device) -> float:
    a, b, total = (torch.zeros(_ELEMENTS[device.type], device=device) for _ in range(3))
    seconds = _median_seconds(lambda: torch.add(a, b, out=total), device, 1.0)
    return 3 * total.nbytes / seconds


def _measure_operation(device: torch.device) -> float:
    x = torch.zeros(64, device=device)

    def chain() -> None:
        for _ in range(_CHAIN):
            x.add_(1.0)

    return _median_seconds(chain, device, 0.5) / _CHAIN


def _median_seconds(action: Callable[[], object], device: torch.device, left_seconds: float) -> float:
    """Return the median seconds of one call, after a first call that sets up. With little time left it calls less."""
    first = _seconds(action, 1, device)
    times = max(1, int(_SHORT_SECONDS / max(first, 1e-7))) if first < _SHORT_SECONDS else 1
    rounds = max(1, min(_ROUNDS, int(left_seconds / max(first * times, 1e-7)) - 1))
    return statistics.median(_seconds(action, times, device) for _ in range(rounds))


def _seconds(action: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the seconds of one call. Host synchronisation on CUDA: the clock must not stop before the work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / times
