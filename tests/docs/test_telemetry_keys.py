"""The keys that docs/telemetry.md lists are those of a real run's records."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import read_page
from tests.train.runs import SMALL, train_alone


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Those of six steps, with a record every second one and one validation before the end."""
    folder: Path = tmp_path_factory.mktemp("docs") / "run"
    options = ["--telemetry.every=2", "--train.steps=6", "--train.validate_every=4", "--train.validation_sequences=4"]
    # Too high an entropy and information are asked for, so that alarms are due.
    options += ["--telemetry.alarm_after_steps=2", "--telemetry.entropy_alarm=0.9999", "--optim.learning_rate=0.05"]
    options += ["--telemetry.information_alarm=0.99"]
    done = train_alone(*SMALL, *options, f"--train.run_dir={folder}")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def documented() -> dict[str, str]:
    """Every key of the page's tables, with what is said of it."""
    section = read_page("telemetry.md").partition("## The keys")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for names, what in re.findall(r"^\| (`[^|]+`) \| (.+) \|$", section, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in found, f"{name} is there twice"
            found[name] = what
    return found


def keys(record: dict[str, Any]) -> set[str]:
    return {re.sub(r"/layer_\d+$", "/layer_NN", name) for name in record} - {"step"}


def test_every_key_is_documented_and_every_documented_key_is_there(records):
    written = set().union(*(keys(record) for record in records))
    listed = set(documented())
    assert written - listed == set(), "keys that docs/telemetry.md does not list"
    # The scale is fp16's alone, which needs a GPU; this model has no hidden copies.
    others = {"train/loss_scale", "moe/assignments_with_copies", "moe/copies"}
    assert listed - written == others, "keys that docs/telemetry.md lists and no record has"


def test_a_key_that_not_every_record_has_says_when(records):
    always = set.intersection(*(keys(record) for record in records))
    for name, what in documented().items():
        assert what.startswith("only ") == (name not in always), name


def test_experts_and_ranks_are_lists(records):
    (counts,) = {name for name in records[-1] if name.startswith("moe/counts/")}
    assert len(records[-1][counts]) == 4
    (rows,) = {name for name in records[-1] if name.startswith("moe/rank_rows/")}
    assert len(records[-1][rows]) == 1
