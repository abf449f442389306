"""Sums first, ratios last: steps of several ranks become one window, and a window becomes figures."""

import dataclasses
import math

import pytest
import torch

from moe_train.distributed.traffic import TrafficMeter
from moe_train.model.moe.steps import RoutingSums
from moe_train.train.step_result import StepResult
from moe_train.train.telemetry.load_metrics import max_violation, routing_record
from moe_train.train.telemetry.metrics_window import GlobalStep, StepWindow, reduce_step
from tests.model.small import sums_with
from tests.ranks import RankPool

CPU = torch.device("cpu")


def sums_of(rank: int, step: int = 0) -> RoutingSums:
    counts = torch.tensor([[1, 2, 3, 0], [5, 5, 5, 5 + 4 * rank + step]])
    layers = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return sums_with(
        counts.shape,
        importance=counts * 0.5,
        load=counts * 1.5,
        probability=counts * 0.25,
        counts=counts,
        dropped=torch.tensor([[0, 0, 3, 0], [0, 0, 0, 0]]),
        entropy=layers * 3,
        squared_logsumexp=layers * 6,
        tokens=torch.tensor([3, 10]),
        sequences=torch.tensor([1, 1]),
        rows=torch.tensor([4 + rank, 8]),
    )


def result_of(rank: int, step: int = 0) -> StepResult:
    loss = torch.tensor(2.0 + rank)
    return StepResult(loss, loss - 1, sums_of(rank, step), torch.tensor(0.25), skipped=False)


def window_on_rank(rank: int, world_size: int) -> GlobalStep:
    window = StepWindow(TrafficMeter(CPU))
    for step in range(2):
        result = result_of(rank, step)
        window.add(result)
    return window.reduce(result, rank, world_size)


def test_ranks_and_steps_are_added(pool2: RankPool) -> None:
    for found in pool2.run(window_on_rank):
        assert (found.loss, found.cross_entropy, found.grad_norm) == (2.5, 1.5, 0.25)  # of the last step
        window = found.window
        assert window is not None and window.num_steps == 2
        assert window.sums.counts.tolist() == [[4, 8, 12, 0], [20, 20, 20, 20 + 8 + 2]]
        assert window.rows_LW.tolist() == [[8, 10], [16, 16]]  # of every rank for itself
        for name in RoutingSums.__dataclass_fields__:
            expected = sum(getattr(sums_of(rank, step), name).double() for rank in (0, 1) for step in (0, 1))
            assert torch.equal(getattr(window.sums, name), expected), name


def test_a_reset_window_is_empty_and_so_is_its_meter() -> None:
    meter = TrafficMeter(CPU)
    window = StepWindow(meter)
    with meter.counting(), meter.measure(100):
        pass
    window.add(result_of(0))
    first = window.reduce(result_of(0), 0, 1).window
    assert first is not None and first.all_to_all_bytes == 100 and first.all_to_all_seconds > 0
    window.reset()
    assert window.reduce(result_of(0), 0, 1).window is None
    window.add(result_of(0))
    again = window.reduce(result_of(0), 0, 1).window
    assert again is not None and again.num_steps == 1 and again.all_to_all_bytes == 0
    assert torch.equal(again.sums.counts, sums_of(0).counts.double())


def test_without_experts_there_is_no_window() -> None:
    assert reduce_step(result_of(0), 1).window is None
    window = StepWindow(TrafficMeter(CPU))
    dense = dataclasses.replace(result_of(0), sums=None)
    window.add(dense)
    assert window.reduce(dense, 0, 1).window is None


def test_adding_keeps_no_graph_and_changes_no_step() -> None:
    meter = TrafficMeter(CPU)
    window, step = StepWindow(meter), result_of(0)
    leaf = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    step = dataclasses.replace(step, sums=dataclasses.replace(step.sums, importance=leaf * 2))
    window.add(step)
    window.add(step)
    total = window.reduce(step, 0, 1).window
    assert total is not None and not total.sums.importance.requires_grad
    assert torch.equal(step.sums.importance.detach(), torch.full((2, 4), 2.0, dtype=torch.float64))


def test_max_violation_of_known_counts() -> None:
    assert max_violation(torch.tensor([4.0, 4, 4, 4])).item() == 0.0
    assert max_violation(torch.tensor([16.0, 0, 0, 0])).item() == 3.0  # E - 1
    assert max_violation(torch.zeros(4)).item() == -1.0  # nothing routed: finite


def test_figures_of_known_sums_and_the_worst_layer() -> None:
    window = StepWindow(TrafficMeter(CPU))
    window.add(result_of(1))
    found = window.reduce(result_of(1), 0, 1).window
    assert found is not None
    record = routing_record(dataclasses.replace(found, rows_LW=torch.tensor([[4.0, 2.0], [3.0, 3.0]])), (1, 3))
    assert record["moe/max_violation"] == record["moe/max_violation/layer_01"] == pytest.approx(1.0)
    assert record["moe/max_violation/layer_03"] == pytest.approx(0.5)
    assert record["moe/counts/layer_03"] == [5, 5, 5, 9]
    # population variance of 1, 2, 3, 0 is 1.25, its mean 1.5
    assert record["moe/load_cv2/layer_01"] == pytest.approx(1.25 / 1.5**2)
    assert record["moe/dropped_fraction"] == record["moe/dropped_fraction/layer_01"] == pytest.approx(3 / 6)
    assert record["moe/dropped_fraction/layer_03"] == 0
    assert record["moe/router_entropy/layer_01"] == pytest.approx(3 / 3)
    assert record["moe/router_entropy"] == record["moe/router_entropy/layer_03"] == pytest.approx(6 / 10)  # the lowest
    assert record["moe/z_loss"] == record["moe/z_loss/layer_01"] == pytest.approx(6 / 3)
    assert record["moe/rank_overload"] == pytest.approx(4 / 3) and record["moe/rank_overload/layer_03"] == 1
    assert record["moe/rank_rows/layer_01"] == [4, 2]
    assert record["moe/steps"] == 1 and record["moe/all_to_all_bytes"] == 0


def test_collapsed_routing_has_the_largest_figures_there_are() -> None:
    counts = torch.zeros(1, 8, dtype=torch.int64)
    counts[0, :2] = 50
    sums = sums_with(counts.shape, importance=counts.double(), load=counts.double(), counts=counts)
    window = StepWindow(TrafficMeter(CPU))
    loss = torch.tensor(0.0)
    step = StepResult(loss, loss, sums, loss, skipped=False)
    window.add(step)
    found = window.reduce(step, 0, 1).window
    assert found is not None
    record = routing_record(found, (0,))
    assert record["moe/load_cv2"] == pytest.approx(8 / 2 - 1, rel=1e-9)
    assert record["moe/max_violation"] == pytest.approx(8 / 2 - 1)
    assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
