"""Records of a run in metrics.jsonl: one JSON object per line, whose keys are "step" and TensorBoard tags."""

import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_train.config.errors import UsageError

Record = dict[str, Any]

_LONGEST_LINE = 1 << 24  # bytes; a record of 64 layers of 1,024 experts has less than one
# Figures of how experts share the work: a record has each of them for the worst layer and, with /layer_NN, for all.
EXPERT_FIGURES: dict[str, Callable[[Sequence[float]], float]] = {
    "moe/max_violation": max,
    "moe/importance_cv2": max,
    "moe/load_cv2": max,
    "moe/router_entropy": min,
    "moe/dropped_fraction": max,
    "moe/rank_overload": max,
    "moe/z_loss": max,
}
# Figures of what the routers have learned, which not every record has: from routers with noise, and from validation.
LEARNING_FIGURES = ("moe/clean_agreement", "moe/clean_kappa", "val/expert_information", "val/max_violation")
ALARMS = ("moe/alarms", "val/alarms")  # lists of warnings


def layer_name(name: str, layer: int) -> str:
    """Return the name of one layer's value, such as "moe/load_cv2/layer_03"."""
    return f"{name}/layer_{layer:02d}"


def by_layer(name: str, values: Sequence, layers: Sequence[int]) -> Record:
    """Return the value of each layer by its name in a record."""
    return {layer_name(name, layer): value for layer, value in zip(layers, values, strict=True)}


def expert_counts(record: Record) -> dict[int, list[int]]:
    """Return the tokens of every expert, by layer."""
    start = layer_name("moe/counts", 0).removesuffix("00")
    return {int(name.removeprefix(start)): row for name, row in record.items() if name.startswith(start)}


def read_records(path: Path) -> list[Record]:
    """Read the records of a metrics.jsonl, without a last line that a kill has cut off.

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
    """Append a record as one line: whole, or not at all.

    The file is opened for each record, so that the line goes to the right place if the folder was moved or made again.

    Raises:
        OSError: If the record cannot be written.
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
    """Add figures to the last record, if it is of the same step; else append a record.

    Raises:
        OSError: If the record cannot be written.
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
    # The new line is longer than the old one: a kill in the middle leaves a last line that is cut off, and is ignored.
    with path.open("r+b") as file:
        file.seek(start)
        file.write((json.dumps(last | record, allow_nan=False) + "\n").encode())
        file.truncate()


def drop_records_from(path: Path, first_step: int) -> None:
    """Drop the records of step first_step (from 0) and of later steps, because they are made again."""
    kept = [record for record in read_records(path) if record["step"] <= first_step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    part.replace(path)
