"""The records of a run in metrics.jsonl: one JSON object a line, keys are TensorBoard tags, and the step."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def drop_records_from(path: Path, first_step: int) -> None:
    """Keep the records of the steps that are done before step first_step (from 0): the others are made again."""
    kept = [record for record in read_records(path) if record["step"] <= first_step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    part.replace(path)
