"""Rounds in which everything that is compared has its turn, and the figures of the rounds.

What slows the machine down for a while then slows all of them down, and the ratios of each round stay sound.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

Item = TypeVar("Item")
Figure = TypeVar("Figure")


def in_turn(items: Sequence[Item], number: int) -> list[Item]:
    """Order of a round: each begins with another item, because what comes first may gain or lose by it.

    Args:
        items: What has its turn.
        number: Number of the round, from 0.
    """
    first = number % max(1, len(items))
    return [*items[first:], *items[:first]]


def run_rounds(
    items: Sequence[Item],
    rounds: int,
    measure: Callable[[Item, int], Figure],
    *,
    warm_ups: int = 0,
    rotates: bool = True,
) -> dict[Item, list[Figure]]:
    """Measure every item once per round.

    Args:
        items: What has its turn.
        rounds: Number of rounds.
        measure: Called with an item and the number of the round, from 0; negative in rounds that warm up.
        warm_ups: Rounds before, whose figures do not count.
        rotates: Whether each round begins with another item.

    Returns:
        Figures of every round by item.
    """
    for number in range(-warm_ups, 0):
        for item in items:
            measure(item, number)
    figures: dict[Item, list[Figure]] = {item: [] for item in items}
    for number in range(rounds):
        for item in in_turn(items, number if rotates else 0):
            figures[item].append(measure(item, number))
    return figures


def round_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratio of two figures in each round: what slows a whole round down does not count."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of each round."""
    return statistics.median(round_ratios(numerators, denominators))


def quartiles(
    values: Sequence[float], method: Literal["inclusive", "exclusive"] = "inclusive"
) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; one value is all three.

    Args:
        values: Figures of the rounds, at least one.
        method: Definition of a quartile, as `statistics.quantiles` names it.
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method=method)
    return lower, median, upper
