"""Difference of two checkpoints, whatever layouts wrote them, computed in bounded memory."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.tools.inspection import check_sizes, read_chunks
from moe_train.config.base import field_values


@dataclass(frozen=True)
class TensorDifference:
    """Difference between the values of one name in both checkpoints.

    Attributes:
        name: Name of the logical tensor or buffer.
        kind: weight, exp_avg, exp_avg_sq or buffer.
        differing: Number of elements that are not the same bit for bit.
        max_difference: Largest absolute difference; infinite if a value is not finite.
        relative_l2: Norm of the difference, divided by the larger of both norms; infinite if a value is not finite.
    """

    name: str
    kind: str
    differing: int
    max_difference: float
    relative_l2: float

    def is_within(self, tolerance: float | None) -> bool:
        """Return whether the values are equal, or within a tolerance.

        Args:
            tolerance: Largest relative L2 that counts as equal; None: bit for bit.
        """
        return self.differing == 0 or (tolerance is not None and self.relative_l2 <= tolerance)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; infinite values become None."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class FieldDifference:
    """Field that differs between two checkpoints.

    Attributes:
        name: Dotted name of the field.
        a: Value in the first checkpoint; None if it is absent.
        b: Value in the second checkpoint; None if it is absent.
    """

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Difference:
    """Difference between two checkpoints.

    Attributes:
        a: Folder of the first checkpoint.
        b: Folder of the second checkpoint.
        fields: Differing fields of the manifests: step, layout, tokenizer and others.
        config: Differing fields of the configuration.
        only_in_a: Tensors and buffers that only the first has.
        only_in_b: Tensors and buffers that only the second has.
        other_shape: Differing shapes of tensors and lengths of buffers.
        tensors: Tensors and buffers of both, the largest difference first.
        tolerance: Relative L2 that counts as equal; None: bit for bit.
    """

    a: str
    b: str
    fields: tuple[FieldDifference, ...]
    config: tuple[FieldDifference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shape: tuple[FieldDifference, ...]
    tensors: tuple[TensorDifference, ...]
    tolerance: float | None

    @property
    def is_equal(self) -> bool:
        """Whether weights, moments and buffers are equal; everything else may differ."""
        if self.only_in_a or self.only_in_b or self.other_shape:
            return False
        return all(tensor.is_within(self.tolerance) for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        tensors = [tensor.as_dict() for tensor in self.tensors]
        return {"equal": self.is_equal} | asdict(self) | {"tensors": tensors}


def compare_checkpoints(a: Manifest, b: Manifest, tolerance: float | None = None) -> Difference:
    """Compare two checkpoints; every tensor of both is read in parts.

    Args:
        a: Manifest of the first checkpoint.
        b: Manifest of the second checkpoint, of any layout.
        tolerance: Relative L2 that counts as equal; None: bit for bit.

    Raises:
        DamagedCheckpoint: If a file is missing, was cut, or cannot be read.
    """
    for manifest in (a, b):
        check_sizes(manifest)
    ours, theirs = _shapes(a), _shapes(b)
    both = sorted(ours.keys() & theirs.keys())
    alike = [name for name in both if ours[name] == theirs[name]]
    tensors = [*_compare_tensors(a, b, alike), *_compare_buffers(a, b, alike)]
    return Difference(
        a=str(a.folder),
        b=str(b.folder),
        fields=differing_fields(_facts(a), _facts(b)),
        config=differing_fields(a.config, b.config),
        only_in_a=tuple(sorted(ours.keys() - theirs.keys())),
        only_in_b=tuple(sorted(theirs.keys() - ours.keys())),
        other_shape=tuple(FieldDifference(name, ours[name], theirs[name]) for name in both if name not in alike),
        tensors=tuple(sorted(tensors, key=lambda found: (-found.relative_l2, -found.differing, found.name))),
        tolerance=tolerance,
    )


def differing_fields(a: dict[str, Any], b: dict[str, Any]) -> tuple[FieldDifference, ...]:
    """List the fields of nested plain values that differ, by their dotted names."""
    ours, theirs = dict(field_values(a)), dict(field_values(b))
    names = sorted(ours.keys() | theirs.keys())
    found = [FieldDifference(name, ours.get(name), theirs.get(name)) for name in names]
    return tuple(one for one in found if one.a != one.b or type(one.a) is not type(one.b))


def _facts(manifest: Manifest) -> dict[str, Any]:
    names = ("format_version", "step", "consumed_sequences", "optimizer_step", "loss_scale", "tokenizer", "layout")
    return {name: getattr(manifest, name) for name in (*names, "moments", "tensor_moments")}


def _shapes(manifest: Manifest) -> dict[str, list[int]]:
    tensors = {name: list(shape) for name, shape in manifest.shapes.items()}
    return tensors | {f"buffer {name}": [len(values)] for name, values in manifest.buffers.items()}


def _compare_tensors(a: Manifest, b: Manifest, names: Iterable[str]) -> Iterator[TensorDifference]:
    with RangeReader(a) as ours, RangeReader(b) as theirs:
        for name in names:
            for kind in a.kinds_of(name) if name in a.shapes else ():
                chunks = zip(read_chunks(ours, a, name, kind), read_chunks(theirs, b, name, kind), strict=True)
                yield _compare(name, kind, chunks)


def _compare_buffers(a: Manifest, b: Manifest, names: Iterable[str]) -> Iterator[TensorDifference]:
    for name, values in a.buffers.items():
        if f"buffer {name}" in names:
            pair = tuple(torch.tensor(each, dtype=torch.float64) for each in (values, b.buffers[name]))
            yield _compare(name, "buffer", [(pair[0], pair[1])])


def _compare(name: str, kind: str, chunks: Iterable[tuple[Tensor, Tensor]]) -> TensorDifference:
    differing, largest, apart, square_a, square_b = 0, 0.0, 0.0, 0.0, 0.0
    for a, b in chunks:
        bits = torch.int64 if a.dtype == torch.float64 else torch.int32
        unequal = a.view(bits) != b.view(bits)  # bit for bit: NaN is equal to itself, 0 and -0 are not equal
        square_a += _finite_square(a)
        square_b += _finite_square(b)
        if number := int(unequal.sum()):
            distance = (a[unequal].double() - b[unequal].double()).abs().nan_to_num(nan=math.inf)
            differing += number
            largest = max(largest, float(distance.max()))
            apart += float(distance.square().sum())
    norm = math.sqrt(max(square_a, square_b))
    relative = math.inf if math.isinf(apart) else math.sqrt(apart) / norm if apart else 0.0
    return TensorDifference(name, kind, differing, largest, relative)


def _finite_square(values: Tensor) -> float:
    return float(values.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum())
