"""Speed and memory of a machine, as `moe-train doctor` measures them and `moe-train plan` reads them."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from moe_train.config.base import Section
from moe_train.config.errors import UsageError
from moe_train.config.yaml_text import parse_yaml

Arithmetic = Literal["bf16", "fp16", "fp32"]


class Link(Section):
    """Seconds of one collective operation: latency_seconds + bytes / bytes_per_second."""

    latency_seconds: float = Field(ge=0.0)
    """Seconds that the operation takes without any bytes."""
    bytes_per_second: PositiveFloat
    """Bytes per second that one rank sends to others while all ranks of the group send; what a rank keeps for itself
    does not count. With n ranks and B bytes per rank, a rank sends (n - 1)/n B in an all-to-all and in an all-gather of
    n parts of B/n, twice as much in an all-reduce, and B in a hop of a ring."""


class Network(Section):
    """Speed of the collective operations among ranks."""

    all_to_all: Link
    """Uneven all-to-all of rows."""
    all_reduce: Link
    """Sum over all ranks."""
    all_gather: Link
    """All-gather; a reduce-scatter takes as long."""
    ring: Link | None = None
    """Hop of a ring: every rank sends to the next one, and receives from the one before. None: as an all-gather."""


class Host(Section):
    """Host of a node's devices, to whose memory ZeRO-Offload moves the optimizer."""

    memory_bytes: PositiveInt
    """Bytes of memory of the node, for all its ranks."""
    memory_bytes_per_second: PositiveFloat
    """Bytes per second that the cores of one rank read and write while those of all ranks do."""
    link_bytes_per_second: PositiveFloat
    """Bytes per second between one device and pinned memory, in one direction, while all devices of the node copy."""


class Product(Section):
    """Speed of a matrix product of one shape, measured while all ranks of the node work."""

    rows: PositiveInt
    """Rows of the left matrix [rows, width]."""
    width: PositiveInt
    """Rows and columns of the right matrix [width, width]."""
    flops_per_second: PositiveFloat
    """Operations per second: 2 rows width^2 over the seconds of the product."""


class Machine(Section):
    """One kind of device, its node and its network, as one rank sees them while all ranks work."""

    name: str
    """Name of the machine, for people."""
    device: Literal["cpu", "cuda"] = "cuda"
    """cpu: ranks are processes on cores; their collective operations need the same cores, so that no computation on the
    node hides them; cuda: one GPU per rank."""
    memory_bytes: PositiveInt
    """Bytes of memory of one rank: the memory of its GPU, or its share of the host memory."""
    flops_per_second: dict[Arithmetic, PositiveFloat]
    """Peak speed of large matrix products for each arithmetic: from a data sheet, or the best that was measured."""
    products: dict[Arithmetic, tuple[Product, ...]] = Field({})
    """Measured speeds of products of several sizes; without them, a share of the peak is assumed."""
    memory_bytes_per_second: PositiveFloat
    """Bytes per second that an elementwise operation on large tensors reads and writes."""
    operation_seconds: float = Field(ge=0.0)
    """Fixed seconds of one small operation: the launch of a kernel, or the host's time for it."""
    ranks_per_node: PositiveInt
    """Ranks per node during the measurement; for a data sheet, the devices of a node."""
    host: Host | None = None
    """Host of the node's devices; None: not known, or the device is a cpu, whose memory is the host's."""
    intra_node: Network | None = None
    """Network among the ranks of one node; None: not known, for example because each node had one rank."""
    inter_node: Network | None = None
    """Network across nodes, among one rank of each node, all with the same place in their nodes; None: not known."""


def read_machine(path: Path) -> Machine:
    """Read a machine from a file: YAML or JSON, bare or as the key "machine" of what `moe-train doctor --json` prints.

    Raises:
        UsageError: If there is no such file, or a field of it is wrong; it names the file and the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or a name that no file can have
        raise UsageError(f"{path}: cannot be read: {error}") from error
    last = (text.strip().splitlines() or [""])[-1]
    try:
        # `doctor --json` prints one object as its last line, whatever a launcher has printed before it.
        found = json.loads(last) if last.startswith("{") else parse_yaml(text)
    except (ValueError, RecursionError) as error:
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
