"""The writer of records: JSON lines, and what the sinks are told."""

import json
import math
from pathlib import Path
from typing import Any

from moe_train.train.telemetry.records import Record, drop_records_from, expert_counts, read_records
from moe_train.train.telemetry.writer import MetricsWriter

RECORD = {
    "train/loss": 2.5,
    "moe/max_violation": 1.0,
    "moe/max_violation/layer_01": 1.0,
    "moe/counts/layer_01": [4, 0, 4, 8],
    "moe/counts/layer_03": [1, 1, 1, 1],
    "moe/alarms": ["layer 1, expert 1: no token for 10 steps"],
}


def test_records_of_steps_to_be_made_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "x": i}) + "\n" for i in range(1, 6)) + '{"step": 6, "x')
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]  # a kill may cut the last line
    drop_records_from(path, 3)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, 2, {}, say=print)
    writer.write(3, {"x": 30})
    writer.close()
    assert [record["x"] for record in read_records(path)] == [1, 2, 30]


def test_layers_are_read_from_the_names_of_a_record() -> None:
    assert expert_counts(RECORD) == {1: [4, 0, 4, 8], 3: [1, 1, 1, 1]}
    assert expert_counts({"moe/counts/layer_117": [1]}) == {117: [1]}


class RecordingSink:
    """A sink that notes what it is told, and fails from a step on, as on a full disk."""

    def __init__(self, fails_at: float = math.inf) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._fails_at = fails_at

    def describe(self, *about: Any) -> None:
        self.told.append(("describe", *about))

    def write(self, step: int, record: Record) -> None:
        if step >= self._fails_at:
            raise OSError("no space left")
        self.told.append(("write", step, record))

    def rewind(self, step: int) -> None:
        self.told.append(("rewind", step))

    def close(self) -> None:
        self.told.append(("close",))


def test_sinks_are_told_everything_in_order(tmp_path: Path) -> None:
    sink = RecordingSink()
    writer = MetricsWriter(tmp_path, 0, {"a sink": sink}, say=print)
    writer.describe((1, 3), {"model.hidden_size": 32}, "the text")
    writer.write(7, RECORD)
    writer.complete(7, {"val/x": 1.0})
    writer.rewind(5)
    writer.close()
    assert sink.told == [
        ("describe", (1, 3), {"model.hidden_size": 32}, "the text"),
        ("write", 7, RECORD),
        ("write", 7, {"val/x": 1.0}),
        ("rewind", 5),
        ("close",),
    ]


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, {}, say=print)
    writer.write(7, RECORD)
    writer.close()
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 7} | RECORD]


def test_a_sink_that_fails_gets_no_more_and_the_others_do(tmp_path: Path) -> None:
    broken, sound, said = RecordingSink(fails_at=2), RecordingSink(), list[str]()
    writer = MetricsWriter(tmp_path, 0, {"the broken one": broken, "the sound one": sound}, said.append)
    for step in (1, 2, 3):
        writer.write(step, {"x": step})
    writer.close()
    assert broken.told == [("write", 1, {"x": 1})]
    assert [step for _, step, *_ in sound.told[:-1]] == [1, 2, 3] and sound.told[-1] == ("close",)
    (line,) = said
    assert "step 2" in line and "the broken one" in line and "no space left" in line
    assert len(read_records(tmp_path / "metrics.jsonl")) == 3


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, {}, say=print)
    writer.write(1, {"train/grad_norm": math.inf, "train/loss": 1.0})
    writer.close()
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "train/grad_norm": None, "train/loss": 1.0}]
