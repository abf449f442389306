"""What the runs of both scopes come to."""

from typing import Any

import pytest

from benchmarks.balance_scope.rows import SCOPES, SETTINGS, RunResult, pairs_of, read_result
from moe_train.config.load import load_config


def results(step: list[float | None], micro_step: list[float | None], skipped: int = 0) -> list[RunResult]:
    return [
        RunResult("s", scope, seed, 100, skipped if scope == "step" else 0, 1.0, end)
        for scope, ends in zip(SCOPES, (step, micro_step))
        for seed, end in enumerate(ends)
    ]


def test_a_loss_within_the_noise_is_as_good() -> None:
    (pair,) = pairs_of(results([2.0, 2.3, 2.2], [2.1, 2.2, 2.1]))
    assert pair.difference == pytest.approx(0.1 / 3) and pair.difference < (pair.noise or 0)
    assert pair.holds


def test_a_worse_loss_a_skip_and_a_divergence_are_seen() -> None:
    (worse,) = pairs_of(results([2.21, 2.3, 2.2], [2.1, 2.2, 2.1]))
    (skips,) = pairs_of(results([2.0, 2.0], [2.0, 2.0], skipped=1))
    (diverged,) = pairs_of(results([2.0, None], [2.0, 2.0]))
    assert not worse.holds and not skips.holds and not diverged.holds
    assert diverged.diverged == {"step": 1, "micro_step": 0} and diverged.difference is None
    (both,) = pairs_of(results([2.0, None], [None, 2.0]))
    assert not both.holds  # no seed tells which is better


def test_losses_are_compared_over_the_seeds_that_both_completed() -> None:
    (worse,) = pairs_of(results([2.21, 2.3, 2.2, 2.4], [2.1, 2.2, 2.1, None]))
    assert worse.difference == pytest.approx(0.31 / 3) and not worse.holds
    (one,) = pairs_of(results([2.21, 2.3], [2.1, None]))
    assert one.difference is None and one.holds  # it diverged less often


def test_a_run_is_read_from_its_records() -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "train/loss": 3.0, "train/grad_norm": 1.0, "train/skipped": 0},
        {"step": 2, "train/loss": 3.0, "train/grad_norm": None, "train/skipped": 1},
    ]
    assert read_result("s", "step", 0, records) == RunResult("s", "step", 0, 2, 1, float("inf"), None)
    records[-1]["val/bits_per_byte"] = 2.5
    assert read_result("s", "step", 0, records).bits_per_byte == 2.5


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_has_cv2_terms(setting: str) -> None:
    moe = load_config([*SETTINGS[setting], "--train.run_dir=unused"], program="t").model.moe
    assert moe.importance_cv2_coef > 0 and moe.load_cv2_coef > 0
