"""Settings without effect are said: each in one line that names field and value; a run without any has no line."""

from typing import Any

import pytest

from moe_train.config.base import merge
from moe_train.config.errors import UsageError
from moe_train.config.load import validate_config
from moe_train.train.remarks import remarks
from tests.resolved import resolve_for

PLAIN: dict[str, Any] = {
    "train": {"run_dir": "r", "steps": 200, "validate_every": 50},
    "model": {"num_layers": 2},
    "optim": {"warmup_steps": 20},
    "data": {"source": "text", "paths": ["a.txt"]},
}


def said(changes: dict[str, Any], world_size: int = 1, has_held_out: bool = True) -> list[str]:
    config = resolve_for(validate_config(merge(PLAIN, changes)), world_size)
    return list(remarks(config, has_held_out))


def test_a_plain_run_has_no_remark() -> None:
    assert said({}) == said({}, world_size=2) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": {"warmup_steps": 200}}, ["optim.warmup_steps (200)", "train.steps (200)", "0.001 of", "cosine"]),
        ({"optim": {"warmup_steps": 400, "schedule": "constant"}}, ["optim.warmup_steps (400)", "0.0005 of"]),
        ({"train": {"steps": 10, "validate_every": 0}}, ["optim.warmup_steps (20)", "train.steps (10)"]),
        ({"optim": {"schedule": "wsd", "decay_fraction": 0.95}}, ["optim.warmup_steps (20)", "decay_fraction (0.95)"]),
        (
            {"model": {"moe": {"switch_aux_coef": 0.1, "coef_schedules": {"switch_aux_coef": [[0, 1], [200, 0]]}}}},
            ["coef_schedules.switch_aux_coef", "step 200", "train.steps (200)"],
        ),
        ({"train": {"validate_every": 201}}, ["train.validate_every (201)", "train.steps (200)"]),
        (
            {"checkpoint": {"every": 500}, "train": {"log_every": 300}},
            ["checkpoint.every (500), train.log_every (300)"],
        ),
        ({"telemetry": {"dead_after_steps": 900}}, ["telemetry.dead_after_steps (900)"]),
        ({"parallel": {"dispatch": "unique", "chunks": 2}}, ["parallel.dispatch (unique), parallel.chunks (2)"]),
        (
            {"parallel": {"zero_stage": 3, "peer_timeout_seconds": 9}},
            ["on one rank: parallel.zero_stage (3), parallel.p"],
        ),
        ({"model": {"sliding_window": 256}}, ["model.sliding_window (256)", "train.sequence_length (256)"]),
        (
            {"model": {"window_pattern": [64, 512]}},
            ["window 512 of model.window_pattern", "train.sequence_length (256)"],
        ),
        ({"model": {"moe": {"capacity_factor": 4}}}, ["model.moe.capacity_factor (4)", "num_experts / top_k (4)"]),
        ({"model": {"moe": {"eval_capacity_factor": 5}}}, ["model.moe.eval_capacity_factor (5)"]),
    ],
)
def test_what_has_no_effect_is_said(changes: dict[str, Any], words: list[str]) -> None:
    lines = said(changes)
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_short_runs() -> None:
    short = {"train": {"steps": 2, "validate_every": 0, "profile_steps": 4}, "optim": {"warmup_steps": 0}}
    assert "train.profile_steps (4), from step 3 on" in said(short)[0]
    long = merge(short, {"train": {"steps": 32, "max_grad_norm_ratio": 5}})
    assert "train.max_grad_norm_ratio (5.0), which needs 32 steps" in said(long)[0]
    assert said(merge(long, {"train": {"steps": 33}})) == []


def test_what_several_ranks_use_is_not_remarked_on() -> None:
    changes = {"parallel": {"dispatch": "unique", "chunks": 2, "zero_stage": 3, "peer_timeout_seconds": 9}}
    assert said(changes, world_size=2) == []


def test_validation_of_nothing_is_said() -> None:
    (line,) = said({}, has_held_out=False)
    assert "nothing is held out" in line
    assert "train.validate_every (50) has no effect" in line
    assert "data.validation_fraction (0.02)" in line
    (line,) = said({"train": {"validate_every": 0}}, has_held_out=False)
    assert "nothing is held out:" in line
    nothing = {"train": {"validate_every": 0}, "data": {"validation_fraction": 0}}
    assert said(nothing, has_held_out=False) == []  # as the user wants it


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"validation_fraction": 0}, r"train\.validate_every \(50\) has no effect.*validation_fraction is 0"),
        ({"source": "synthetic", "paths": []}, r"train\.validate_every \(50\) has no effect.*synthetic"),
        (
            {
                "source": "python_stdlib",
                "paths": [],
                "validation_fraction": 0,
                "mixture": [{"source": "text", "paths": ["a"]}],
            },
            r"train\.validate_every \(50\) has no effect",
        ),
        ({"validation_paths": ["b"], "validation_fraction": 0.5}, r"data\.validation_fraction \(0\.5\) has no effect"),
        ({"validation_paths": ["b"], "validation_max_bytes": 5}, r"data\.validation_max_bytes \(5\) has no effect"),
    ],
)
def test_settings_of_held_out_text_without_effect_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        validate_config(merge(PLAIN, {"data": data}))
