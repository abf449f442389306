"""Which steps are skipped, on one process; tests/train/test_faults.py has them in real runs."""

import signal
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.checkpoint.manifest import StepControlState
from moe_train.train.progress import Progress
from moe_train.train.step_control import NUM_NEEDED, NUM_REMEMBERED, StepControl
from moe_train.train.step_result import Gradients
from tests.ranks import RankPool


def make_step_control(ratio: float | None = 10.0, received=lambda: None, is_done=lambda: False, **more) -> StepControl:
    return StepControl(
        max_norm_ratio=ratio,
        max_skipped=3,
        rank=more.pop("rank", 0),
        received=received,
        save_is_done=is_done,
        save_is_due=more.pop("is_due", lambda: False),
        **more,
    )


def gradients(norm: float, loss: float = 1.0, overflowed: bool = False) -> Gradients:
    return Gradients(torch.tensor(loss), torch.tensor(norm), overflowed)


@pytest.mark.parametrize("norm", [float("inf"), float("nan"), -1.0])
def test_numbers_that_are_not_finite_are_skipped_from_the_first_step(norm: float) -> None:
    step_control = make_step_control()
    assert step_control.should_skip(gradients(norm))
    decision = step_control.conclude(Progress(0, 0), 4)
    assert decision.skipped is not None and "not finite" in decision.skipped.reason
    assert step_control.should_skip(gradients(1.0, loss=float("nan")))
    assert not step_control.should_skip(gradients(1.0))
    assert step_control.state == StepControlState((1.0,), 1)  # concluded once


def test_too_many_in_a_row_are_exhausting_and_one_good_step_ends_the_row() -> None:
    step_control = make_step_control()
    ends = []
    for step, norm in enumerate([float("inf"), float("inf"), 1.0, float("inf"), float("inf"), float("inf")]):
        step_control.should_skip(gradients(norm))
        ends.append(step_control.conclude(Progress(step, 4 * step), 4).is_exhausted)
    assert ends == [False] * 5 + [True]
    assert [(s.step, s.first_sequence, s.num_sequences) for s in step_control.streak] == [
        (3, 12, 4),
        (4, 16, 4),
        (5, 20, 4),
    ]


@given(
    st.lists(st.floats(2**-6, 2**7, width=32), min_size=NUM_NEEDED, max_size=200), st.floats(2**-10, 2**13, width=32)
)
def test_a_norm_is_held_against_the_median_of_the_last_steps(norms: list[float], norm: float) -> None:
    step_control = make_step_control(state=StepControlState(tuple(norms)))
    bound = 10.0 * statistics.median(norms[-NUM_REMEMBERED:])
    assert step_control.norm_bound == bound
    assert step_control.should_skip(gradients(norm)) == (norm > torch.tensor(bound, dtype=torch.float32).item())


def test_without_a_ratio_or_enough_steps_no_norm_is_too_large() -> None:
    few = StepControlState((1.0,) * (NUM_NEEDED - 1))
    assert make_step_control(state=few).norm_bound is None and not make_step_control(state=few).should_skip(
        gradients(1e9)
    )
    assert not make_step_control(None, state=StepControlState((1.0,) * 100)).should_skip(gradients(1e9))


def test_an_overflow_of_the_loss_scale_is_no_fault() -> None:
    step_control = make_step_control()
    for step in range(9):
        assert not step_control.should_skip(gradients(float("inf"), overflowed=True))
        assert not step_control.conclude(Progress(step, 0), 4).is_exhausted
    assert step_control.state == StepControlState()
    assert step_control.should_skip(
        gradients(float("inf"), loss=float("inf"), overflowed=True)
    )  # no scale is to blame for the loss


def decide(rank: int, world_size: int) -> tuple:
    """Rank 1 has a bad loss and a signal; its save has ended, rank 0's has not, but rank 0 finds another one due."""
    step_control = make_step_control(
        rank=rank,
        received=lambda: signal.SIGUSR1 if rank == 1 else None,
        is_done=lambda: rank == 1 or world_size == 0,
        is_due=lambda: rank == 0,
    )
    skip = step_control.should_skip(gradients(2.0, loss=float("nan") if rank == 1 else 1.0))
    decision = step_control.conclude(Progress(7, 28), 4)
    return (
        skip,
        decision.stop,
        decision.save_ended,
        decision.save_is_due,
        decision.skipped.reason if decision.skipped else None,
    )


def test_ranks_decide_together(pool2: RankPool) -> None:
    expected = (True, "SIGUSR1 on rank 1", False, True, "the loss of rank 1 is not finite")
    assert pool2.run(decide) == [expected, expected]
