"""What a machine can do, as `moe-train doctor` measures it and `moe-train plan` reads it."""

import json
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from moe_train.config.base import Section
from moe_train.config.errors import UsageError

Arithmetic = Literal["bf16", "fp16", "fp32"]


class Link(Section):
    """What one collective operation takes: latency_seconds + bytes / bytes_per_second."""

    latency_seconds: float = Field(ge=0.0)
    """Seconds of the operation without any bytes."""
    bytes_per_second: PositiveFloat
    """Bytes that one rank sends to others in a second while all ranks of the group do so; what a rank keeps for itself
    is not counted. Of n ranks that share B bytes each, it sends (n - 1)/n B in an all-to-all and in an all-gather of n
    parts of B/n, and twice as much in an all-reduce."""


class Network(Section):
    """The collective operations among ranks."""

    all_to_all: Link
    """Uneven all-to-all of rows."""
    all_reduce: Link
    """Sum over all ranks."""
    all_gather: Link
    """All-gather; a reduce-scatter takes as long."""


class Product(Section):
    """How fast a matrix product of one shape is, with all ranks of the node at work."""

    rows: PositiveInt
    """Rows of the left matrix [rows, width]."""
    width: PositiveInt
    """Rows and columns of the right matrix [width, width]."""
    flops_per_second: PositiveFloat
    """2 rows width^2 operations over the seconds that they take."""


class Machine(Section):
    """One kind of device, its node and its network, as one rank sees them while all ranks work."""

    name: str
    """What it is, for people."""
    device: Literal["cpu", "cuda"] = "cuda"
    """cpu: ranks are processes on cores, which their collective operations take too, so that these hide behind no work
    of the same node; cuda: a GPU a rank."""
    memory_bytes: PositiveInt
    """Memory of one rank: of its GPU, or its share of the host's."""
    flops_per_second: dict[Arithmetic, PositiveFloat]
    """Peak of large matrix products by arithmetic: a data sheet's, or the best that was measured."""
    products: dict[Arithmetic, tuple[Product, ...]] = Field({})
    """Measured products over rows and widths; without them a share of the peak is assumed."""
    memory_bytes_per_second: PositiveFloat
    """Bytes read and written in a second by an elementwise operation on large tensors."""
    operation_seconds: float = Field(ge=0.0)
    """Fixed seconds of one small operation: launch of a kernel, or the host's time for it."""
    ranks_per_node: PositiveInt
    """Ranks of a node with which this was measured; on a data sheet its devices."""
    intra_node: Network | None = None
    """Among ranks of one node; None: not known, as where each node had one rank."""
    inter_node: Network | None = None
    """Among ranks of several nodes, one of each at a time in the same place; None: not known."""


def read_machine(path: Path) -> Machine:
    """Read a machine from a file: YAML or JSON, bare or as the key "machine" of what `moe-train doctor --json` prints.

    Raises:
        UsageError: If there is no such file, or a field of it is wrong; with the file's and the field's name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    last = (text.strip().splitlines() or [""])[-1]
    try:
        # `doctor --json` prints one object as its last line, whatever a launcher has printed before it.
        found = json.loads(last) if last.startswith("{") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: is neither JSON nor YAML: {error}") from error
    if isinstance(found, dict) and "machine" in found:
        found = found["machine"]
    try:
        return Machine.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path}: {place or 'the file'}: {first['msg']} (a machine as moe-train doctor --json prints it)"
        ) from error
