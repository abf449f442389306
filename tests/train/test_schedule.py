"""The learning rate is a function of the step."""

import itertools

import pytest

from moe_train.config.run import OptimConfig
from moe_train.train.schedule import learning_rate


def rates(num_steps: int, **settings) -> list[float]:
    optim = OptimConfig(learning_rate=1.0, **settings)
    return [learning_rate(step, num_steps, optim) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    found = rates(100, schedule=schedule, warmup_steps=10)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(found) == pytest.approx(1.0)


def test_cosine_ends_at_the_lowest_and_passes_the_middle() -> None:
    found = rates(111, schedule="cosine", warmup_steps=10, min_learning_rate_ratio=0.2)
    assert found[-1] == pytest.approx(0.2)
    assert found[60] == pytest.approx(0.6)  # half-way between steps 10 and 110
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_wsd_is_constant_then_linear() -> None:
    found = rates(101, schedule="wsd", warmup_steps=0, decay_fraction=0.2, min_learning_rate_ratio=0.0)
    assert found[:80] == [1.0] * 80
    assert found[90] == pytest.approx(0.5)
    assert found[100] == pytest.approx(0.0)


def test_constant_stays() -> None:
    assert rates(50, schedule="constant", warmup_steps=5)[5:] == [1.0] * 45


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_alone_and_one_step_do_not_divide_by_zero(schedule: str) -> None:
    assert rates(1, schedule=schedule, warmup_steps=1) == [1.0]
    assert rates(10, schedule=schedule, warmup_steps=10)[-1] == 1.0
