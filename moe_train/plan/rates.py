"""How long products and elementwise work take on a machine.

Measured products are interpolated in the logarithms of rows and width, a product [m, k] x [k, n] counting as m rows of
width sqrt(k n). A data sheet tells only a peak: then a product takes as long as the slower of its operations, at a
share of the peak that falls with each dimension d as d / (d + 128), and of reading and writing its matrices.
"""

import bisect
import math
from dataclasses import dataclass

from moe_train.config.machine import Arithmetic, Machine, Product
from moe_train.plan.layout import DTYPE_BYTES

PEAK_SHARE = 0.75  # of the data sheet's, that large products reach
STREAM_SHARE = 0.6  # of the rate of one long sum, that elementwise work between a model's products reaches
_LONG_SECONDS = 5e-3  # a product that takes as long is not over within a slice of a core's time
_HALF_RATE_SIZE = 128  # a dimension at which a tile of a GPU's kernel is half used


@dataclass(frozen=True)
class Rates:
    """The speed of one rank.

    Attributes:
        machine: As measured, or of a data sheet.
        precision: Of the model.
    """

    machine: Machine
    precision: Arithmetic

    @property
    def is_cpu(self) -> bool:
        """Whether ranks are processes on cores, which collective operations take too."""
        return self.machine.device == "cpu"

    @property
    def sustained(self) -> float:
        """Operations a second that no product exceeds for long. Where ranks share cores, a product of a millisecond may
        be timed within one slice of a core's time, as if the core were the rank's own."""
        measured = self.machine.products.get(self.precision, ())
        if not self.is_cpu or not measured:
            return math.inf
        seconds = {product: 2.0 * product.rows * product.width**2 / product.flops_per_second for product in measured}
        long = [product for product in measured if seconds[product] >= _LONG_SECONDS]
        return max(product.flops_per_second for product in long or [max(measured, key=lambda each: seconds[each])])

    @property
    def sharing(self) -> float:
        """How much longer work takes than when timed in a slice of a core's time: 1 where every rank has a core."""
        measured = self.machine.products.get(self.precision, ())
        if not self.is_cpu or not measured:
            return 1.0
        return max(1.0, max(product.flops_per_second for product in measured) / self.sustained)

    def product(self, m: float, k: float, n: float, precision: Arithmetic | None = None) -> float:
        """Seconds of [m, k] x [k, n]."""
        if min(m, k, n) <= 0:
            return 0.0
        used = precision or self.precision
        if used not in self.machine.flops_per_second:
            used = self.precision
        flops, measured = 2.0 * m * k * n, self.machine.products.get(used, ())
        moved = DTYPE_BYTES[used] * (m * k + k * n + m * n)
        if measured:
            # A measured product is repeated with the same matrices; a model's come from memory.
            rate = min(_interpolate(measured, m, math.sqrt(k * n)), self.sustained)
            return flops / rate + self.moving(moved)
        return max(flops / self._reached((m, k, n), used), self.moving(moved))

    def fused(self, flops: float, sizes: tuple[float, float, float], elements: float) -> float:
        """Seconds of products in one kernel, which keeps what is between them.

        Args:
            flops: Of all products.
            sizes: Dimensions of one of them.
            elements: Of the matrices that are read and written.
        """
        m, k, n = sizes
        measured = self.machine.products.get(self.precision, ())
        rate = _interpolate(measured, m, math.sqrt(k * n)) if measured else self._reached(sizes, self.precision)
        return max(flops / rate, self.moving(DTYPE_BYTES[self.precision] * elements))

    def _reached(self, sizes: tuple[float, float, float], precision: Arithmetic) -> float:
        """Operations a second of a product of these dimensions on a device of a data sheet."""
        share = PEAK_SHARE
        for size in sizes:
            share *= size / (size + _HALF_RATE_SIZE)
        return share * self.machine.flops_per_second[precision]

    def gradients(self, m: float, k: float, n: float, precision: Arithmetic | None = None) -> float:
        """Seconds of both gradients of [m, k] x [k, n]."""
        return self.product(m, n, k, precision) + self.product(k, m, n, precision)

    def moving(self, num_bytes: float) -> float:
        """Seconds of reading and writing so many bytes."""
        return num_bytes / self.machine.memory_bytes_per_second

    def elementwise(self, num_bytes: float) -> float:
        """Seconds of reading and writing so many bytes in a model's activations: in short or strided pieces."""
        return self.moving(num_bytes) / STREAM_SHARE

    def operations(self, number: float) -> float:
        """Fixed seconds of so many operations."""
        return number * self.machine.operation_seconds * self.sharing


def _interpolate(products: tuple[Product, ...], rows: float, width: float) -> float:
    """Operations a second; outside of what was measured, as at its edge."""
    widths = sorted({product.width for product in products})
    below, above, part = _place(widths, width)
    found = []
    for size in (below, above):
        by_rows = {product.rows: product.flops_per_second for product in products if product.width == size}
        low, high, share = _place(sorted(by_rows), rows)
        found.append((1 - share) * math.log(by_rows[low]) + share * math.log(by_rows[high]))
    return math.exp((1 - part) * found[0] + part * found[1])


def _place(sizes: list[int], size: float) -> tuple[int, int, float]:
    """The neighbours of a size among sorted ones, and how far it is from the lower to the upper, in logarithms."""
    place = bisect.bisect_left(sizes, size)
    if place == 0:
        return sizes[0], sizes[0], 0.0
    if place == len(sizes):
        return sizes[-1], sizes[-1], 0.0
    low, high = sizes[place - 1], sizes[place]
    return low, high, math.log(size / low) / math.log(high / low)
