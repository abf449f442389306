"""Lines of metrics.jsonl."""

from pathlib import Path

from moe_train.train.telemetry.records import append_record, complete_record, read_records


def test_a_record_is_completed_or_appended(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    complete_record(path, {"step": 1, "val/x": 0.5})
    append_record(path, {"step": 2, "train/loss": 3.0})
    complete_record(path, {"step": 2, "val/x": 0.25})
    complete_record(path, {"step": 3, "val/x": 0.125})
    assert read_records(path) == [
        {"step": 1, "val/x": 0.5},
        {"step": 2, "train/loss": 3.0, "val/x": 0.25},
        {"step": 3, "val/x": 0.125},
    ]


def test_a_line_that_is_cut_off_is_not_completed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1, "train/loss": 3.0})
    path.write_text(path.read_text() + '{"step": 2, "train')
    before = path.stat().st_size
    complete_record(path, {"step": 2, "val/x": 1.0})
    assert path.stat().st_size > before and path.read_text().startswith('{"step": 1, "train/loss": 3.0}\n')
