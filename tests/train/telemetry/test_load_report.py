"""The load of experts over a run's last records, as figures, as a table and as `moe-train load` prints it."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.cli.main import main
from moe_train.train.telemetry.load_report import expert_load, layer_table, load_table
from moe_train.train.telemetry.records import EXPERT_FIGURES, Record, by_layer
from tests.processes import run_process


def record(step: int, counts: dict[int, list[int]], steps: int = 10, **figures: float) -> Record:
    made: Record = {"step": step, "moe/steps": steps}
    made |= by_layer("moe/counts", list(counts.values()), list(counts))
    for name in EXPERT_FIGURES:
        value = figures.get(name.removeprefix("moe/"), 0.5)
        made |= {name: value, **by_layer(name, [value] * len(counts), list(counts))}
    return made


def run_of(num_records: int) -> list[Record]:
    records = []
    for i in range(num_records):
        late = i >= num_records // 2
        counts = {1: [4, 0, 2] if late else [2, 2, 2], 3: [2, 2, 2]}
        records.append(record(10 * (i + 1), counts, max_violation=1.0 if late else 0.0, router_entropy=0.1 * (i + 1)))
        records.append({"step": 10 * (i + 1), "val/bits_per_byte": 2.0})
    return records


def test_the_last_steps_are_summed_and_the_worst_layer_is_first() -> None:
    report = expert_load(run_of(20), num_steps=100)
    assert report is not None
    assert (report.num_steps, report.num_records, report.last_step) == (100, 10, 200)
    assert [load.layer for load in report.layers] == [1, 3]
    worst = report.layers[0]
    assert worst.counts == [40, 0, 20] and worst.dead == [1]
    assert worst.max_violation == pytest.approx(1.0) and worst.shares == [2.0, 0.0, 1.0]
    assert worst.figures["router_entropy"] == pytest.approx(sum(0.1 * i for i in range(11, 21)) / 10)
    assert report.max_violation == 1.0


def test_records_that_cover_more_steps_weigh_more() -> None:
    records = [
        record(30, {0: [3, 1]}, steps=30, load_cv2=0.0, max_violation=0.5),
        record(40, {0: [0, 4]}, steps=10, load_cv2=1.0, max_violation=1.0),
    ]
    report = expert_load(records)
    assert report is not None
    (load,) = report.layers
    assert load.figures["load_cv2"] == pytest.approx(0.25)
    assert load.max_violation == pytest.approx(5 / 4 - 1) and load.mean_max_violation == pytest.approx(0.75)
    newest = expert_load(records, num_steps=1)
    assert newest is not None and newest.layers[0].counts == [0, 4]


def test_without_experts_there_is_no_report() -> None:
    assert expert_load([]) is None
    assert expert_load([{"step": 1, "train/loss": 1.0}]) is None


def test_figures_that_were_not_finite_are_left_out() -> None:
    records = [record(10, {0: [3, 1]}, load_cv2=1.0), record(20, {0: [3, 1]}, load_cv2=3.0)]
    records[0]["moe/load_cv2/layer_00"] = records[0]["moe/max_violation"] = None
    report = expert_load(records)
    assert report is not None and report.layers[0].figures["load_cv2"] == 3.0


def shown(table: object) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_tables_have_a_bar_an_expert() -> None:
    report = expert_load(run_of(20))
    assert report is not None
    text = shown(load_table(report))
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert "01" in rows[0] and "█·▅" in rows[0].replace(" ", "")
    assert "03" in rows[1] and "dead experts: 1 in layer 01 (1)" in text
    assert "03" not in "".join(line for line in shown(load_table(report, 1)).splitlines() if line.startswith("│"))
    text = shown(layer_table(report.layers[0]))
    bars = [line.count("█") for line in text.splitlines() if line.startswith("│")]
    assert bars == [40, 20, 0]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with records."""
    lines = [*run_of(20)[:-2], run_of(20)[-2] | {"moe/alarms": ["layer 1, expert 1: no token for 100 steps"]}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_command_prints_a_table_and_one_object(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["load", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "last 100 steps" in text and "warning: layer 1, expert 1" in text
    assert main(["load", str(run_dir), "--layer", "3"]) == 0
    assert "Layer 03" in capsys.readouterr().out
    assert main(["load", str(run_dir), "--json", "--steps", "20", "--layers", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["num_steps"] == 20 and found["alarms"] == ["layer 1, expert 1: no token for 100 steps"]
    (layer,) = found["layers"]
    assert layer["layer"] == 1 and layer["counts"] == [8, 0, 4] and layer["dead_experts"] == [1]
    assert {
        "max_violation",
        "load_cv2",
        "importance_cv2",
        "router_entropy",
        "dropped_fraction",
        "shares",
    } <= layer.keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], ["RUN_DIR ('/nowhere')", "metrics.jsonl"]),
        (["DIR", "--layer", "2"], ["--layer (2)", "1, 3"]),
        (["DIR", "--steps", "0"], ["--steps (0)"]),
        (["DIR", "--layers", "-1"], ["--layers (-1)"]),
    ],
)
def test_bad_arguments(run_dir: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: list[str]) -> None:
    assert main(["load", *(str(run_dir) if part == "DIR" else part for part in arguments)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "change",
    [
        {"moe/steps": "ten"},
        {"moe/counts/layer_x": [1, 2, 3]},
        {"moe/counts/layer_01": []},
        {"moe/counts/layer_01": [1, 2]},
        {"moe/counts/layer_05": [1, 2, 3]},
        {"moe/load_cv2/layer_01": "high"},
        {"moe/max_violation": None, "moe/steps": None},
    ],
)
def test_records_that_are_not_of_one_run(run_dir: Path, capsys: pytest.CaptureFixture, change: dict) -> None:
    (run_dir / "metrics.jsonl").open("a").write(json.dumps(run_of(20)[-2] | change) + "\n")
    assert main(["load", str(run_dir)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "records" in message


@pytest.mark.parametrize("line", [b"5", b"null", b'"moe/steps"', b'{"moe/steps": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_line_is_named_unless_it_is_the_last(
    run_dir: Path, capsys: pytest.CaptureFixture, line: bytes
) -> None:
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + line)
    assert main(["load", str(run_dir)]) == 0
    path.write_bytes(line + b"\n" + whole)
    capsys.readouterr()
    assert main(["load", str(run_dir)]) == 2
    message = capsys.readouterr().err
    assert "metrics.jsonl: line 1 is not a record" in message


def test_an_output_without_block_characters(run_dir: Path) -> None:
    command = [sys.executable, "-m", "moe_train", "load", str(run_dir)]
    result = run_process(command, timeout=60, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and "dead experts: 1 in layer 01" in result.stdout, result


def test_a_run_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    assert main(["load", str(tmp_path)]) == 2
    assert "telemetry.experts" in capsys.readouterr().err
