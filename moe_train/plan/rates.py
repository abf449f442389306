"""Speed of a machine: seconds of matrix products, elementwise work and operations.

Measured products are interpolated in the logarithms of rows and width. A product [m, k] x [k, n] counts as m rows of
width sqrt(k n). A data sheet gives only a peak. Then a product takes the longer of two times: its arithmetic, and the
reads and writes of its matrices. The arithmetic reaches a share of the peak with a factor d / (d + 128) for each
dimension d.
"""

import bisect
import math
from dataclasses import dataclass

from moe_train.config.machine import Arithmetic, Machine, Product
from moe_train.plan.layout import DTYPE_BYTES

PEAK_SHARE = 0.75  # share of the data sheet's peak that large products reach
STREAM_SHARE = 0.6  # share of the rate of one long sum that elementwise work between the products of a model reaches
_LONG_SECONDS = 5e-3  # a product of this duration does not end within one time slice of a core
_HALF_RATE_SIZE = 128  # a dimension at which a tile of a GPU kernel is half used


@dataclass(frozen=True)
class Rates:
    """Speed of one rank.

    Attributes:
        machine: Machine with measured rates, or with the rates of a data sheet.
        precision: Precision of the model.
    """

    machine: Machine
    precision: Arithmetic

    @property
    def is_cpu(self) -> bool:
        """Whether ranks are processes on CPU cores, which collective operations use too."""
        return self.machine.device == "cpu"

    @property
    def sustained(self) -> float:
        """Operations per second that no product exceeds for long.

        Where ranks share cores, a measured product of a millisecond may fit into one time slice of a core. It then
        looks as fast as on a core of its own.
        """
        measured = self.machine.products.get(self.precision, ())
        if not self.is_cpu or not measured:
            return math.inf
        seconds = {product: 2.0 * product.rows * product.width**2 / product.flops_per_second for product in measured}
        long = [product for product in measured if seconds[product] >= _LONG_SECONDS]
        return max(product.flops_per_second for product in long or [max(measured, key=lambda each: seconds[each])])

    @property
    def sharing(self) -> float:
        """Factor by which work takes longer than within one time slice of a core; 1 where every rank has a core."""
        measured = self.machine.products.get(self.precision, ())
        if not self.is_cpu or not measured:
            return 1.0
        return max(1.0, max(product.flops_per_second for product in measured) / self.sustained)

    def product(self, m: float, k: float, n: float, precision: Arithmetic | None = None) -> float:
        """Compute the seconds of the product [m, k] x [k, n].

        Args:
            m: Rows of the first matrix.
            k: Columns of the first matrix.
            n: Columns of the second matrix.
            precision: Precision of the product; None, or a precision without known rate: precision of the model.
        """
        if min(m, k, n) <= 0:
            return 0.0
        used = precision or self.precision
        if used not in self.machine.flops_per_second:
            used = self.precision
        flops, measured = 2.0 * m * k * n, self.machine.products.get(used, ())
        moved = DTYPE_BYTES[used] * (m * k + k * n + m * n)
        if measured:
            # The measurement repeats a product with the same matrices; the matrices of a model come from memory.
            rate = min(_interpolate(measured, m, math.sqrt(k * n)), self.sustained)
            return flops / rate + self.moving(moved)
        return max(flops / self._reached((m, k, n), used), self.moving(moved))

    def fused(self, flops: float, sizes: tuple[float, float, float], elements: float) -> float:
        """Compute the seconds of several products in one kernel, which does not write intermediate results to memory.

        Args:
            flops: Operations of all products.
            sizes: Dimensions m, k, n of one product.
            elements: Elements of the matrices that are read and written.
        """
        m, k, n = sizes
        measured = self.machine.products.get(self.precision, ())
        rate = _interpolate(measured, m, math.sqrt(k * n)) if measured else self._reached(sizes, self.precision)
        return max(flops / rate, self.moving(DTYPE_BYTES[self.precision] * elements))

    def _reached(self, sizes: tuple[float, float, float], precision: Arithmetic) -> float:
        """Compute the operations per second of a product of these dimensions, from the peak of a data sheet."""
        share = PEAK_SHARE
        for size in sizes:
            share *= size / (size + _HALF_RATE_SIZE)
        return share * self.machine.flops_per_second[precision]

    def gradients(self, m: float, k: float, n: float, precision: Arithmetic | None = None) -> float:
        """Compute the seconds of both gradients of the product [m, k] x [k, n]; arguments as in `product`."""
        return self.product(m, n, k, precision) + self.product(k, m, n, precision)

    def moving(self, num_bytes: float) -> float:
        """Compute the seconds of reading and writing this number of bytes."""
        return num_bytes / self.machine.memory_bytes_per_second

    def elementwise(self, num_bytes: float) -> float:
        """Compute the seconds of elementwise work on this number of bytes, in short or strided reads and writes."""
        return self.moving(num_bytes) / STREAM_SHARE

    def operations(self, number: float) -> float:
        """Compute the fixed seconds of this number of operations."""
        return number * self.machine.operation_seconds * self.sharing


def _interpolate(products: tuple[Product, ...], rows: float, width: float) -> float:
    """Interpolate the operations per second; outside the measured range, take the value at its edge."""
    widths = sorted({product.width for product in products})
    below, above, part = _place(widths, width)
    found = []
    for size in (below, above):
        by_rows = {product.rows: product.flops_per_second for product in products if product.width == size}
        low, high, share = _place(sorted(by_rows), rows)
        found.append((1 - share) * math.log(by_rows[low]) + share * math.log(by_rows[high]))
    return math.exp((1 - part) * found[0] + part * found[1])


def _place(sizes: list[int], size: float) -> tuple[int, int, float]:
    """Find the neighbours of a size among sorted sizes, and its position between them (0 to 1) in logarithms."""
    place = bisect.bisect_left(sizes, size)
    if place == 0:
        return sizes[0], sizes[0], 0.0
    if place == len(sizes):
        return sizes[-1], sizes[-1], 0.0
    low, high = sizes[place - 1], sizes[place]
    return low, high, math.log(size / low) / math.log(high / low)
