"""The records of a run in metrics.jsonl: one JSON object a line, keys are TensorBoard tags, and the step."""

import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_train.config.errors import UsageError

Record = dict[str, Any]

_LONGEST_LINE = 1 << 24  # bytes; a record of 64 layers of 1,024 experts has less than one
# How experts share the work: each is in a record as the worst layer's value and, with /layer_NN, every layer's.
EXPERT_FIGURES: dict[str, Callable[[Sequence[float]], float]] = {
    "moe/max_violation": max,
    "moe/importance_cv2": max,
    "moe/load_cv2": max,
    "moe/router_entropy": min,
    "moe/dropped_fraction": max,
    "moe/rank_overload": max,
    "moe/z_loss": max,
}


def layer_name(name: str, layer: int) -> str:
    """The name of one layer's value: "moe/load_cv2/layer_03"."""
    return f"{name}/layer_{layer:02d}"


def by_layer(name: str, values: Sequence, layers: Sequence[int]) -> Record:
    """A value of each layer under its name."""
    return {layer_name(name, layer): value for layer, value in zip(layers, values, strict=True)}


def expert_counts(record: Record) -> dict[int, list[int]]:
    """Tokens of every expert, by layer."""
    start = layer_name("moe/counts", 0).removesuffix("00")
    return {int(name.removeprefix(start)): row for name, row in record.items() if name.startswith(start)}


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
        UsageError: If another line is not a record.
    """
    records: list[Record] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record["step"], int)):
                raise ValueError("no step")
        except (ValueError, KeyError, RecursionError) as error:
            if number == len(lines):
                break
            raise UsageError(f"{path}: line {number} is not a record ({error}): repair or remove it") from error
        records.append(record)
    return records


def append_record(path: Path, record: Record) -> None:
    """Write a record as a line behind the others: whole, or not at all.

    The file is opened for each, so that a folder that was moved away or remade is written to where it is now.

    Raises:
        OSError: If it cannot be written.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "no space left")
        except OSError:
            file.truncate(before)
            raise


def complete_record(path: Path, record: Record) -> None:
    """Add to the last record if it is of the same step; else append one.

    Raises:
        OSError: If it cannot be written.
    """
    end = path.stat().st_size if path.exists() else 0
    tail = b""
    if end:
        with path.open("rb") as file:
            file.seek(max(0, end - _LONGEST_LINE))
            tail = file.read()
    line = tail[tail.rfind(b"\n", 0, len(tail) - 1) + 1 :]
    try:
        last, start = json.loads(line), end - len(line)
    except ValueError:  # nothing there, or cut off
        last, start = {}, 0
    if last.get("step") != record["step"]:
        append_record(path, record)
        return
    # Longer than what it replaces: a kill in the middle leaves a last line that is cut off, which is passed over.
    with path.open("r+b") as file:
        file.seek(start)
        file.write((json.dumps(last | record, allow_nan=False) + "\n").encode())
        file.truncate()


def drop_records_from(path: Path, first_step: int) -> None:
    """Keep the records of the steps that are done before step first_step (from 0): the others are made again."""
    kept = [record for record in read_records(path) if record["step"] <= first_step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    part.replace(path)
