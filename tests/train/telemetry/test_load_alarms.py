"""Warnings: once when something begins, again only after it was over, and the same after resuming."""

import math
from dataclasses import replace

import pytest

from moe_train.config.moe import MoEConfig
from moe_train.config.run import TelemetryConfig
from moe_train.train.telemetry.load_alarms import Bounds, LoadAlarms
from moe_train.train.telemetry.records import Record

BOUNDS = Bounds(dead_after_steps=20, max_violation=1.5, entropy=0.1, after_steps=30)
LEARNING = replace(BOUNDS, kappa=0.1, information=0.02, warmup_steps=20)


def record(counts: dict[int, list[int]], violation: float = 0.0, entropy: float = 1.0, steps: int = 10) -> Record:
    made: Record = {"step": 1000, "moe/steps": steps}
    for layer, row in counts.items():
        made[f"moe/counts/layer_{layer:02d}"] = row
        made[f"moe/max_violation/layer_{layer:02d}"] = violation
        made[f"moe/router_entropy/layer_{layer:02d}"] = entropy
    return made


FINE = record({1: [5, 5, 5], 3: [5, 5, 5]})
IDLE = record({1: [5, 0, 10], 3: [5, 5, 5]})


def test_a_dead_expert_is_named_once() -> None:
    watch = LoadAlarms((1, 3), BOUNDS)
    assert watch.observe(IDLE) == []
    assert watch.dead_experts() == {
        "moe/dead_experts": 0,
        "moe/dead_experts/layer_01": 0,
        "moe/dead_experts/layer_03": 0,
    }
    assert watch.observe(IDLE) == ["layer 01, expert 1: no token for 20 steps"]
    assert watch.dead_experts()["moe/dead_experts/layer_01"] == watch.dead_experts()["moe/dead_experts"] == 1
    for _ in range(50):
        assert watch.observe(IDLE) == []
    both = record({1: [5, 0, 10], 3: [15, 0, 0]})
    assert [watch.observe(both), watch.observe(both)] == [
        [],
        ["layer 03, experts 1, 2: no token for 20 steps"],
    ]
    assert watch.dead_experts()["moe/dead_experts"] == 2  # of the worst layer


def test_one_that_came_back_may_be_warned_of_again() -> None:
    watch = LoadAlarms((1, 3), BOUNDS)
    said = [watch.observe(each) for each in (IDLE, IDLE, FINE, FINE, IDLE, IDLE, IDLE)]
    assert [bool(warnings) for warnings in said] == [False, True, False, False, False, True, False]


def test_one_that_comes_and_goes_is_said_once() -> None:
    watch = LoadAlarms((1, 3), BOUNDS)
    said = [watch.observe(each) for each in (IDLE, IDLE, FINE) * 20]
    assert [bool(warnings) for warnings in said] == [False, True] + [False] * 58


def test_many_dead_experts_of_a_layer_are_one_warning() -> None:
    watch = LoadAlarms((1,), BOUNDS)
    collapsed = record({1: [99] + [0] * 255})
    assert watch.observe(collapsed) == []
    (warning,) = watch.observe(collapsed)
    assert warning == "layer 01, experts 1, 2, 3, 4, 5, 6, 7, 8 and 247 more: no token for 20 steps"
    assert watch.dead_experts()["moe/dead_experts/layer_01"] == 255


def test_a_figure_that_was_not_finite_says_nothing() -> None:
    watch = LoadAlarms((1,), BOUNDS)
    unknown = record({1: [9, 1, 1]}) | {"moe/max_violation/layer_01": None, "moe/router_entropy/layer_01": None}
    assert [watch.observe(unknown) for _ in range(9)] == [[]] * 9


def test_max_violation_must_last() -> None:
    watch = LoadAlarms((1,), BOUNDS)
    high, low = record({1: [9, 1, 1]}, violation=1.6), record({1: [5, 5, 5]}, violation=1.4)
    said = [watch.observe(each) for each in (high, high, low, high, high, high, high)]
    assert [len(warnings) for warnings in said] == [0, 0, 0, 0, 0, 1, 0]
    assert said[5] == ["layer 01, expert 0: 2.60 times the mean tokens; MaxVio has been over 1.5 for 30 steps"]


def test_collapsed_entropy_names_the_layer_and_its_busiest_expert() -> None:
    watch = LoadAlarms((2,), BOUNDS)
    said = [watch.observe(record({2: [1, 1, 7]}, entropy=0.05, steps=15)) for _ in range(4)]
    assert [len(warnings) for warnings in said] == [0, 1, 0, 0]
    assert "layer 02, expert 2" in said[1][0] and "0.050 nats" in said[1][0] and "0.100" in said[1][0]


def test_old_records_bring_it_up_to_date() -> None:
    history = [IDLE, {"train/loss": 1.0}, IDLE, IDLE]
    resumed = LoadAlarms((1, 3), BOUNDS, history)
    assert resumed.dead_experts()["moe/dead_experts"] == 1
    assert resumed.observe(IDLE) == []  # it was said before the stop
    half = LoadAlarms((1, 3), BOUNDS, [IDLE])
    assert half.observe(IDLE) == ["layer 01, expert 1: no token for 20 steps"]


@pytest.mark.parametrize(
    ("moe", "telemetry", "violation"),
    [
        ({"num_experts": 8, "top_k": 2}, {}, 1.5),  # half of 8 / 2 - 1
        ({"num_experts": 64, "top_k": 2}, {}, 2.0),
        ({"num_experts": 64, "top_k": 2}, {"max_violation_alarm": 5.0}, 5.0),
    ],
)
def test_bounds_of_a_configuration(moe: dict, telemetry: dict, violation: float) -> None:
    bounds = Bounds.of(TelemetryConfig(**telemetry, dead_after_steps=7, entropy_alarm=0.5), MoEConfig(**moe), 10)
    assert bounds.max_violation == violation and bounds.dead_after_steps == 7
    assert bounds.entropy == pytest.approx(0.5 * math.log(moe["num_experts"]))


def random_choice(step: int, kappa: float | None) -> Record:
    found = {"moe/clean_agreement/layer_01": 0.3, "moe/clean_kappa/layer_01": kappa} if kappa is not None else {}
    return record({1: [5, 5, 5]}) | {"step": step} | found


def test_a_router_that_chooses_by_its_noise_is_named_after_warm_up() -> None:
    watch = LoadAlarms((1,), LEARNING)
    said = [watch.observe(random_choice(step, 0.05)) for step in range(10, 80, 10)]
    assert [len(warnings) for warnings in said] == [0, 0, 0, 0, 1, 0, 0]  # 30 steps, from step 30 on
    assert said[4][0].startswith("layer 01 routes at random: without its noise the router would choose 30.0% of the")
    assert "kappa 0.05" in said[4][0] and "for 30 steps" in said[4][0]
    for kappa in (0.2, None):  # one that decides, and one that draws no noise
        watch = LoadAlarms((1,), LEARNING)
        assert not any(watch.observe(random_choice(step, kappa)) for step in range(10, 200, 10))


def test_held_out_text_shows_a_choice_at_random_too() -> None:
    def validated(step: int, information: float | None) -> Record:
        return {"step": step, "val/expert_information": 0.5, "val/expert_information/layer_01": information}

    watch = LoadAlarms((1,), LEARNING)
    said = [watch.observe_validation(validated(step, 0.01)) for step in (15, 40, 60, 80)]
    assert [len(warnings) for warnings in said] == [0, 0, 1, 0]  # steps since warm-up: 20, 40
    assert "layer 01 routes at random: a token's id explains 1.0%" in said[2][0]
    resumed = LoadAlarms((1,), LEARNING, [validated(40, 0.01), validated(60, 0.01)])
    assert resumed.observe_validation(validated(80, 0.01)) == []  # it was said before
    watch = LoadAlarms((1,), LEARNING)
    assert not any(watch.observe_validation(validated(step, value)) for step in (40, 90, 140) for value in (0.3, None))


def test_where_every_token_goes_to_every_expert_there_is_no_choice_to_warn_of() -> None:
    bounds = Bounds.of(TelemetryConfig(), MoEConfig(num_experts=2, top_k=2, load_cv2_coef=0.0), 10)
    assert bounds.information == 0.0 and Bounds.of(TelemetryConfig(), MoEConfig(), 10).information == 0.02
