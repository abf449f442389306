"""Inspection of a checkpoint: its tensors by name, and the statistics of one of them, in bounded memory."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.manifest import DamagedCheckpoint, Manifest, regular_size
from moe_train.checkpoint.ranges import RangeReader
from moe_train.config.errors import UsageError

CHUNK = 1 << 22  # elements per read


@dataclass(frozen=True)
class TensorSummary:
    """Size of one logical tensor.

    Attributes:
        name: Name in the model.
        shape: Global shape.
        elements: Number of elements.
        share: Share of the elements of all tensors, 0 to 1.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    share: float


@dataclass(frozen=True)
class Inspection:
    """Contents of a checkpoint, for display.

    Attributes:
        folder: Folder of the checkpoint.
        step: Number of completed optimizer steps.
        consumed_sequences: Number of sequences trained on or passed over.
        optimizer_step: Number of Adam's updates.
        loss_scale: Loss scale of fp16; 1 in another precision.
        skipped_steps: Number of steps that step control skipped for bad numbers.
        format_version: Version of the checkpoint format.
        layout: world_size, expert_parallel_size and zero_stage that wrote it; empty in old checkpoints.
        tokenizer: Fingerprint of the tokenizer.
        files: Number of tensor files.
        num_bytes: Bytes of the tensors: fp32 weights and two moments.
        buffers: Number of values of every buffer.
        tensors: Every logical tensor, by name.
        parameters: Number of elements of all tensors.
    """

    folder: str
    step: int
    consumed_sequences: int
    optimizer_step: int
    loss_scale: float
    skipped_steps: int
    format_version: int
    layout: dict[str, int]
    tokenizer: str
    files: int
    num_bytes: int
    buffers: dict[str, int]
    tensors: tuple[TensorSummary, ...]
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Statistics:
    """Statistics of the finite elements of a tensor; the numbers are None if it has no finite element.

    Attributes:
        kind: weight, exp_avg or exp_avg_sq.
        elements: Number of all elements.
        non_finite: Number of elements that are NaN or infinite.
        min: Smallest value.
        max: Largest value.
        mean: Mean.
        std: Standard deviation, with division by the number of values.
        norm: L2 norm: square root of the sum of squares.
    """

    kind: str
    elements: int
    non_finite: int
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    norm: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def inspect_manifest(manifest: Manifest) -> Inspection:
    """Summarise a manifest for display."""
    elements = {name: math.prod(shape) for name, shape in manifest.shapes.items()}
    total = sum(elements.values())
    return Inspection(
        folder=str(manifest.folder),
        step=manifest.step,
        consumed_sequences=manifest.consumed_sequences,
        optimizer_step=manifest.optimizer_step,
        loss_scale=manifest.loss_scale,
        skipped_steps=manifest.step_control.skipped_steps,
        format_version=manifest.format_version,
        layout=manifest.layout,
        tokenizer=manifest.tokenizer,
        files=len(manifest.files),
        num_bytes=manifest.num_bytes,
        buffers={name: len(values) for name, values in manifest.buffers.items()},
        tensors=tuple(
            TensorSummary(name, shape, elements[name], elements[name] / max(1, total))
            for name, shape in sorted(manifest.shapes.items())
        ),
        parameters=total,
    )


def check_sizes(manifest: Manifest) -> None:
    """Compare the files' sizes with the manifest. This is quick, and prevents reading a file that was cut.

    Args:
        manifest: Manifest of the checkpoint.

    Raises:
        DamagedCheckpoint: If a file is missing, is not a regular file, or has another size.
    """
    for file, entry in manifest.files.items():
        path = manifest.folder / file
        try:
            size = regular_size(path)
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
        if entry.num_bytes is not None and size != entry.num_bytes:
            raise DamagedCheckpoint(f"{path} is damaged: it has {size} bytes, the manifest says {entry.num_bytes}")


def read_chunks(reader: RangeReader, manifest: Manifest, name: str, kind: str) -> Iterator[Tensor]:
    """Yield a flattened tensor in parts of at most CHUNK elements, fp32.

    Args:
        reader: Reader of the checkpoint.
        manifest: Manifest of the checkpoint.
        name: Name of the logical tensor.
        kind: One of manifest.kinds_of(name).
    """
    numel = math.prod(manifest.shapes[name])
    for start in range(0, numel, CHUNK):
        yield reader.read(name, kind, start, min(start + CHUNK, numel))


def tensor_statistics(manifest: Manifest, name: str) -> list[Statistics]:
    """Compute the statistics of a tensor's weight and moments.

    Args:
        manifest: Manifest of the checkpoint.
        name: Name of the logical tensor.

    Returns:
        Statistics for each of manifest.kinds_of(name).

    Raises:
        UsageError: If there is no such tensor, or a file cannot be read.
    """
    if name not in manifest.shapes:
        raise UsageError(f"--tensor ({name!r}): {manifest.folder} has no such tensor; inspect lists them")
    check_sizes(manifest)
    with RangeReader(manifest) as reader:
        return [_statistics(kind, read_chunks(reader, manifest, name, kind)) for kind in manifest.kinds_of(name)]


def _statistics(kind: str, chunks: Iterator[Tensor]) -> Statistics:
    elements, count, mean, deviation, square = 0, 0, 0.0, 0.0, 0.0
    least, largest = math.inf, -math.inf
    for chunk in chunks:
        elements += chunk.numel()
        finite = chunk[chunk.isfinite()].double()  # squares of large fp32 values do not fit in fp32
        if not (more := finite.numel()):
            continue
        low, high = torch.aminmax(finite)
        least, largest = min(least, float(low)), max(largest, float(high))
        square += float(finite.square().sum())
        # Means and squared deviations of two parts combine into those of the union (Chan, Golub and LeVeque 1979).
        part = float(finite.mean())
        apart, both = part - mean, count + more
        deviation += float((finite - part).square().sum()) + apart**2 * count * more / both
        mean, count = mean + apart * more / both, both
    if not count:
        return Statistics(kind, elements, elements, None, None, None, None, None)
    std = math.sqrt(deviation / count)
    return Statistics(kind, elements, elements - count, least, largest, mean, std, math.sqrt(square))
