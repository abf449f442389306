"""Processes of benchmarks: ranks in their places, several at a time, and what is said of one that fails."""

import time
from pathlib import Path

import pytest

from benchmarks.runner import processes
from benchmarks.runner.processes import RunFailed, TrainingRun, rank_places, run_ranks, run_training

TELL = """
import os, pathlib, sys
names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR")
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(os.environ.get(name, "-") for name in names))
"""
FAIL = """
import os, time
if os.environ["RANK"] == "0":
    time.sleep(300)
print("first line")
raise SystemExit("what went wrong")
"""


def test_ranks_know_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for on_cpu, accelerator in ((True, "cpu"), (False, "-")):
        with rank_places(2, threads=3, on_cpu=on_cpu) as places:
            run_ranks("telling", ["-c", TELL, str(tmp_path)], places, tmp_path / "logs", 60)
        assert [(tmp_path / name).read_text() for name in "01"] == [f"0 2 3 {accelerator}", f"1 2 3 {accelerator}"]


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    with rank_places(2) as places, pytest.raises(RunFailed) as failed:
        run_ranks("failing", ["-c", FAIL], places, tmp_path, 60)
    assert time.monotonic() - began < 60
    assert failed.value.reason == "what went wrong"
    expected = "failing, rank 1: ended with code 1; the end of its output:\n  | first line\n  | what went wrong"
    assert str(failed.value) == expected


def test_exit_codes_can_be_allowed(tmp_path: Path) -> None:
    with rank_places(1) as places:
        run_ranks("ending", ["-c", "raise SystemExit(1)"], places, tmp_path, 60, allowed=(0, 1))


def test_a_rank_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with rank_places(1) as places, pytest.raises(RunFailed, match="sleeping, rank 0: not done after 1 s"):
        run_ranks("sleeping", ["-c", "import time; time.sleep(300)"], places, tmp_path, 1)


def test_training_runs_are_told_when_they_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of a trainer: a shell that writes the records into the run folder, which is its last word.
    script = 'for word; do folder="${word#--train.run_dir=}"; done; mkdir "$folder"; echo \'{"step": 1}\' > "$folder"/'
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{script}metrics.jsonl\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(interpreter))
    runs = [TrainingRun(name, tmp_path / "runs" / name, ("--train.steps=1",)) for name in ("first", "second", "third")]
    done: list[str] = []
    run_training(runs, 2, 60, lambda run, seconds: done.append(run.name))
    assert sorted(done) == ["first", "second", "third"]
    assert [run.records() for run in runs] == [[{"step": 1}]] * 3
