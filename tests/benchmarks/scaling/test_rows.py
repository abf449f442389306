"""Growth along an axis: slopes, claims, and that what is timed is what its point says."""

from dataclasses import replace

import pytest
import torch

from benchmarks.scaling.rows import MODEL_SEQUENCE, Plan, Point, Timing, claims_of, measure, series_of, slope

LAYERS = [Point("layers", MODEL_SEQUENCE, 8, number) for number in (1, 2, 4)]


def timings(seconds: dict[Point, list[float]]) -> dict[Point, list[Timing]]:
    """With a third of the time in the forward pass."""
    return {point: [Timing(both / 3, both) for both in own] for point, own in seconds.items()}


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_slope_of_a_power_law_is_its_exponent(power: float) -> None:
    sizes = [8, 16, 32, 128]
    assert slope(sizes, [0.3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_ratios_are_of_the_same_round() -> None:
    points = [Point("experts", 64, experts, 0) for experts in (8, 64)]
    # The second round was ten times as slow as the others, for both.
    slow = timings({points[0]: [1.0, 10.0, 1.0], points[1]: [1.1, 11.0, 1.2]})
    (series,) = series_of(slow, dict.fromkeys(points, 7))
    assert [row.ratio for row in series.rows] == pytest.approx([1.0, 1.1])
    assert [row.ms for row in series.rows] == pytest.approx([1000.0, 1200.0])
    assert [row.forward_ms for row in series.rows] == pytest.approx([1000 / 3, 400.0])


@pytest.mark.parametrize(("grown", "holds"), [(1.149, True), (1.151, False)])
def test_a_claim_about_experts_for_every_micro_batch(grown: float, holds: bool) -> None:
    seconds = {Point("experts", tokens, experts, 0): [1.0] for tokens in (64, 256) for experts in (8, 16, 64)}
    seconds |= {Point("experts", 64, 64, 0): [1.5], Point("experts", 256, 64, 0): [grown]}
    smaller, larger = claims_of(series_of(timings(seconds), dict.fromkeys(seconds, 7)))
    assert (smaller["holds"], larger["holds"]) == (False, holds)
    assert smaller["claim"].endswith("at most 15% with 64 tokens a micro-batch: 50.0%.")
    assert larger["claim"].endswith(f"at most 15% with 256 tokens a micro-batch: {grown - 1:.1%}.")


def test_no_claim_without_both_numbers_of_experts() -> None:
    points = [Point("experts", 64, experts, 0) for experts in (8, 16, 32)]
    assert claims_of(series_of(timings({point: [1.0] for point in points}), dict.fromkeys(points, 7))) == []


@pytest.mark.parametrize(("power", "holds"), [(0.9, True), (1.2, False)])
def test_claim_about_layers_is_about_the_slope(power: float, holds: bool) -> None:
    seconds = {point: [point.L**power] for point in LAYERS}
    (claim,) = claims_of(series_of(timings(seconds), dict.fromkeys(LAYERS, 7)))
    assert claim["holds"] is holds and f"as L^{power:.2f} from 1 to 4" in claim["claim"]


def test_what_is_timed_has_the_sizes_of_its_point() -> None:
    plan = Plan(D=8, F=4, K=2, rounds=2, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    points = [Point("experts", tokens, experts, 0) for tokens in (16, 32) for experts in (2, 8)]
    found, parameters = measure(points, plan)
    for point in points:
        assert parameters[point] == point.E * (3 * plan.D * plan.F + plan.D)  # the experts and the router
        assert len(found[point]) == plan.rounds
        assert all(0 < timing.forward < timing.both for timing in found[point])
    _, counts = measure(LAYERS[:2], replace(plan, rounds=1))
    one, two = (counts[point] for point in LAYERS[:2])
    width = 256
    assert two - one == 8 * (3 * width * 512 + width) + 4 * width**2 + 2 * width  # experts, router, attention, norms
