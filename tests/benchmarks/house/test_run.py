"""The traced forward pass, the time of commands, the table, and the worktree of another commit."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.house import run
from benchmarks.house.rank import PathTrace
from benchmarks.house.report import missed_lines, rows_of, table
from benchmarks.house.rows import COMMANDS, Figures, RowPath, time_command, trace_row
from benchmarks.house.source import SourceFigures
from benchmarks.runner.processes import ROOT
from moe_train.config.errors import UsageError
from moe_train.model.layers import WideLinear
from moe_train.model.moe.routers.base import PLAIN
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.ops.row_map import RowMap

SOURCE = SourceFigures(3, 9, 65, "moe_train/a.py", (), (), 5, 1, ("new", "moe_train/a.py"), ("new", "b", "c"))
FIGURES = Figures(SOURCE, RowPath(("moe_train/a.py",), ("moe_train.a:A",), 65), dict.fromkeys(COMMANDS, 0.5))


def traced(function) -> PathTrace:
    """What a call executes."""
    trace = PathTrace(ROOT)
    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return trace


def test_a_dataclass_and_its_function_are_counted() -> None:
    trace = traced(lambda: RowMap.of_order(torch.arange(4), 2))
    assert trace.classes == {"moe_train.ops.row_map:RowMap"}
    assert "moe_train/ops/row_map.py" in trace.files and all((ROOT / path).is_file() for path in trace.files)


def test_a_base_class_counts_where_its_code_runs_and_torch_does_not() -> None:
    layer = WideLinear(4, 2, 0.1)
    trace = traced(lambda: layer(torch.ones(1, 4)))
    assert trace.classes == {"moe_train.model.layers:WideLinear"}  # Linear's methods do not run
    router = SoftmaxTopKRouter(4, 4, 2, True, 0.1, PLAIN)
    trace = traced(lambda: router(torch.ones(3, 4), torch.arange(3)))
    names = {name.partition(":")[2] for name in trace.classes}
    assert {"Router", "SoftmaxTopKRouter", "WideLinear", "Choice", "Routing", "RoutingSums"} <= names


def test_the_layer_is_traced_on_two_ranks() -> None:
    path = trace_row(ROOT)
    names = {name.partition(":")[2] for name in path.classes}
    assert {"MoELayer", "SoftmaxTopKRouter", "FlatDispatcher", "GroupedExperts", "Routing"} <= names
    assert not {"Block", "Transformer", "TwoLevelDispatcher", "LocalDispatcher"} & names
    assert "moe_train/model/moe/dispatch/flat.py" in path.files and "moe_train/model/block.py" not in path.files
    lines = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in path.files)
    assert path.num_lines == lines


def test_a_command_takes_time_and_a_failing_one_is_an_error(tmp_path: Path) -> None:
    assert 0 < time_command(ROOT, "import moe_train", 1) < 5
    (tmp_path / "moe_train").mkdir()
    (tmp_path / "moe_train" / "__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises(Exception, match="exit status 3"):
        time_command(tmp_path, "import moe_train", 1)


def test_a_table_with_a_goal_that_is_missed() -> None:
    text = table(None, FIGURES)
    assert "| classes on a routed row's path | 1 | at most 20 | holds |" in text
    assert "| files to touch for a new mixer | 3 | at most 2 | missed |" in text
    assert "| docstring lines that do not stand alone | 20.0 % |  |  |" in text
    assert missed_lines(FIGURES) == ["", "files to touch for a new mixer (3):", "  new", "  b", "  c"]
    slow = replace(FIGURES, cpu_seconds=FIGURES.cpu_seconds | {"moe-train --help": 0.61})
    missed = {row.name for row in rows_of(slow) if row.is_missed}
    assert missed == {"files to touch for a new mixer", "CPU time of moe-train --help"}


def test_a_table_of_two_trees() -> None:
    before = replace(FIGURES, source=replace(SOURCE, num_files=2))
    assert "| files of moe_train/ | 2 | 3 |  |  |" in table(before, FIGURES)


def test_another_commit_is_measured_in_a_worktree(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository: no other commit to measure")
    seen = []

    def measure(root: Path, repeats: int) -> Figures:
        seen.append((root, (root / "moe_train" / "__init__.py").is_file(), repeats))
        return FIGURES

    monkeypatch.setattr(run, "measure", measure)
    assert run.main(["--against", "HEAD", "--repeats", "2", "--json"]) == 0
    (other, has_package, repeats), (ours, *_) = seen
    assert has_package and repeats == 2 and ours == ROOT and other != ROOT and not other.exists()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["against"] == "HEAD" and found["before"]["source"]["num_files"] == 3
    with pytest.raises(UsageError, match="no_such_commit"):
        run.main(["--against", "no_such_commit"])
