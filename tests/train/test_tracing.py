"""Traces of steps: which steps are in them, and the named ranges of a real run."""

import json
from pathlib import Path

import pytest
import torch

from moe_train.train.tracing import StepTracer
from tests.train.runs import SMALL, train_forked


def names_in(path: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]


@pytest.mark.parametrize(("num_steps", "steps", "traced"), [(2, 6, [2, 3]), (5, 4, [2, 3]), (1, 2, [])])
def test_the_steps_after_the_warm_up_are_traced(tmp_path: Path, num_steps: int, steps: int, traced: list[int]) -> None:
    said: list[str] = []
    tracer = StepTracer(tmp_path / "profile" / "trace.json", num_steps, False, said.append)
    for step in range(steps):
        with tracer.step(), torch.profiler.record_function(f"of step {step}"):
            torch.ones(3).sum()
    tracer.close()
    if not traced:
        assert not said and not (tmp_path / "profile").exists()
        return
    found = {name for name in names_in(tmp_path / "profile" / "trace.json") if name.startswith("of step")}
    assert found == {f"of step {step}" for step in traced}
    assert len(said) == 1 and f"{len(traced)} steps" in said[0]


def test_without_steps_nothing_is_written(tmp_path: Path) -> None:
    tracer = StepTracer(tmp_path / "trace.json", 0, False, lambda _: None)
    for _ in range(4):
        with tracer.step():
            pass
    tracer.close()
    assert not list(tmp_path.iterdir())


def test_a_run_has_a_trace_a_rank_with_the_steps_of_moe_layers(tmp_path: Path) -> None:
    options = ("--train.steps=4", "--train.profile_steps=1", "--train.sample_tokens=0", f"--train.run_dir={tmp_path}/r")
    result = train_forked(2, *SMALL, *options)
    assert result.returncode == 0, result
    assert "trace of 1 steps" in result.stdout
    for rank in range(2):
        names = set(names_in(tmp_path / "r" / "profile" / f"rank_{rank:05d}.json"))
        assert {"moe/route", "moe/dispatch", "moe/experts", "moe/combine"} <= names
