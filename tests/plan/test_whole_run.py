"""A run to a number of tokens: the checkpoints that its retention leaves, counted beside a run of folders."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.checkpoint.folders import Retention, list_checkpoints, remove_checkpoint, step_folder, superfluous
from moe_train.plan.planner import Plan
from moe_train.plan.whole_run import plan_run
from tests.plan.cases import LARGE, planned


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned()


def save_folders(folder: Path, steps: int, every: int, pause: int, retention: Retention) -> tuple[int, int]:
    """Save as a run does, in empty folders: checkpoints at the end, and the most at one time."""
    last, most = 0, 0
    for step in range(1, steps + 1):
        if step == steps or (every and step % every == 0) or (pause and step - last >= pause):
            step_folder(folder, step).mkdir(parents=True)
            last, most = step, max(most, len(list_checkpoints(folder)))
            for old in superfluous(folder, retention):
                remove_checkpoint(old)
    return len(list_checkpoints(folder)), most


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 60),
    every=st.integers(0, 12),
    multiple=st.integers(0, 3),
    keep_last=st.integers(1, 4),
    pause=st.integers(0, 20),
)
def test_retention(plan: Plan, steps: int, every: int, multiple: int, keep_last: int, pause: int) -> None:
    retention = Retention(keep_last, every * multiple)
    changes = {
        "every": every,
        "keep_last": retention.keep_last,
        "keep_every": retention.keep_every,
        "every_minutes": (pause - 0.5) * plan.step.seconds / 60 if pause else 0.0,  # due within step number `pause`
    }
    checkpoint = plan.config.checkpoint.model_copy(update=changes)
    own = replace(plan, config=plan.config.model_copy(update={"checkpoint": checkpoint}))
    run = plan_run(own, steps * LARGE["train.global_batch_size"] * LARGE["train.sequence_length"])
    with tempfile.TemporaryDirectory() as folder:
        expected = save_folders(Path(folder), steps, every, pause, retention)
    found = run.checkpoints
    assert (run.steps, found.num_kept, found.most_bytes // found.num_bytes) == (steps, *expected)
