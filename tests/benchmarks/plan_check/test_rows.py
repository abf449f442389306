"""Rows of the plan_check benchmark, and one setting run for real."""

from pathlib import Path

import pytest

from benchmarks.plan_check.report import markdown_report
from benchmarks.plan_check.rows import SETTINGS, Measured, claims_of, measure, plan_setting, result_row
from benchmarks.plan_check.run import main
from moe_train.plan.devices import DEVICES

CPU = DEVICES["h100"].model_copy(update={"device": "cpu"})


def test_settings_are_of_all_kinds_and_can_be_planned() -> None:
    assert len(SETTINGS) >= 8 and {setting.ranks for setting in SETTINGS} == {1, 2, 4}
    plans = [plan_setting(setting, CPU) for setting in SETTINGS]
    assert {plan.layout.zero_stage for plan in plans} == {1, 2, 3}
    assert {plan.layout.ep_size for plan in plans} == {1, 2, 4}
    assert {plan.layout.recompute.part for plan in plans} == {"none", "attention", "experts", "block"}
    linked = [plan for plan, setting in zip(plans, SETTINGS) if setting.nodes > 1]
    assert {plan.traffic.total.inter_node > 0 for plan in linked} == {True}


def test_claims_hold_only_within_their_bounds() -> None:
    setting = SETTINGS[0]
    plan = plan_setting(setting, CPU)
    exact = result_row(setting, [plan], Measured(1, 1, 0.0, 1.0)).planned
    near = Measured(int(exact["states"]), int(exact["peak"] * 1.1), 0.0, exact["seconds"] * 1.2)
    far = Measured(int(exact["states"] * 1.1), int(exact["peak"] * 1.3), 0.0, exact["seconds"] * 1.5)
    good, bad = (result_row(setting, [plan], found) for found in (near, far))
    assert all(claim["holds"] for claim in claims_of([good]))
    assert not any(claim["holds"] for claim in claims_of([good, bad]))
    report = markdown_report([good, bad], claims_of([good, bad]), ["about"])
    assert "| quickstart_1 | 1 | 1 | 1 |" in report and report.count("DOES NOT HOLD") == 3


def test_planned_time_is_the_mean_of_all_plans() -> None:
    setting, half = SETTINGS[0], {"fp32": CPU.flops_per_second["fp32"] / 2}
    plans = [plan_setting(setting, machine) for machine in (CPU, CPU.model_copy(update={"flops_per_second": half}))]
    row = result_row(setting, plans, Measured(1, 1, 0.0, 1.0))
    assert plans[0].step.seconds < row.planned["seconds"] < plans[1].step.seconds
    assert row.planned["seconds"] == pytest.approx((plans[0].step.seconds + plans[1].step.seconds) / 2)


@pytest.mark.slow
def test_one_setting_for_real(tmp_path: Path) -> None:
    setting = next(setting for setting in SETTINGS if setting.name == "quickstart_2")
    found = measure(setting, 4, tmp_path)
    row = result_row(setting, [plan_setting(setting, CPU)], found)
    assert abs(row.off["states"]) < 0.03 and abs(row.off["peak"]) < 0.15 and abs(row.off["all_to_all"]) < 0.05
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps (0) must be 4 or more"),
        (["--steps", "6"], "--steps (6) must be a multiple of 4"),
        (["--settings", "x"], "invalid choice: 'x'"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and message in printed.err and printed.out == ""
