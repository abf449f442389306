"""Rounds: who has its turn when, and the figures of the rounds."""

import statistics

import pytest

from benchmarks.runner.rounds import in_turn, median_ratio, quartiles, round_ratios, run_rounds


def test_each_round_begins_with_another_item() -> None:
    assert [in_turn("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert in_turn([], 3) == []


def test_warm_ups_do_not_count() -> None:
    turns: list[tuple[str, int]] = []

    def measure(item: str, number: int) -> float:
        turns.append((item, number))
        return 10.0 * number

    assert run_rounds("ab", 3, measure, warm_ups=1) == {"a": [0.0, 10.0, 20.0], "b": [0.0, 10.0, 20.0]}
    warm_up, *rounds = [turns[first : first + 2] for first in range(0, 8, 2)]
    assert warm_up == [("a", -1), ("b", -1)]
    assert rounds == [[("a", 0), ("b", 0)], [("b", 1), ("a", 1)], [("a", 2), ("b", 2)]]


def test_order_can_stay() -> None:
    turns: list[str] = []
    run_rounds("ab", 2, lambda item, _: turns.append(item), rotates=False)
    assert turns == ["a", "b", "a", "b"]


def test_a_slow_round_does_not_count() -> None:
    assert round_ratios([1.0, 10.0, 2.0], [2.0, 20.0, 2.0]) == [0.5, 0.5, 1.0]
    assert median_ratio([1.0, 10.0, 2.0], [2.0, 20.0, 2.0]) == 0.5
    with pytest.raises(ValueError):
        round_ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("method", ["inclusive", "exclusive"])
def test_quartiles(method) -> None:
    values = [4.0, 1.0, 3.0, 2.0, 7.0]
    lower, median, upper = quartiles(values, method)
    assert median == statistics.median(values)
    assert (lower, upper) == {"inclusive": (2.0, 4.0), "exclusive": (1.5, 5.5)}[method]
    assert quartiles([3.0], method) == (3.0, 3.0, 3.0)
