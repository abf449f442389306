"""Sums first, ratios last."""

import json
from pathlib import Path

import pytest
import torch

from moe_train.model.moe.steps import RoutingSums
from moe_train.train.engine import StepResult
from moe_train.train.records import drop_records_from, read_records
from moe_train.train.summary import expert_load
from moe_train.train.telemetry import MetricsWriter, max_violation, reduce_step, routing_record
from tests.ranks import RankPool


def step_of(rank: int) -> StepResult:
    counts = torch.tensor([[1, 2, 3, 0], [5, 5, 5, 5 + 4 * rank]])
    sums = RoutingSums(counts * 0.5, counts * 1.5, counts)
    return StepResult(torch.tensor(2.0 + rank), torch.tensor(1.0 + rank), sums, torch.tensor(0.25), skipped=False)


def reduce_on_rank(rank: int, world_size: int) -> tuple[float, float, list, list]:
    found = reduce_step(step_of(rank), world_size)
    assert found.sums is not None
    return found.loss, found.cross_entropy, found.sums.counts.tolist(), found.sums.importance.tolist()


def test_ranks_add_sums_and_average_losses(pool2: RankPool) -> None:
    for loss, cross_entropy, counts, importance in pool2.run(reduce_on_rank):
        assert (loss, cross_entropy) == (2.5, 1.5)
        assert counts == [[2, 4, 6, 0], [10, 10, 10, 14]]
        assert importance == [[1, 2, 3, 0], [5, 5, 5, 7]]


def test_max_violation_of_known_counts() -> None:
    assert max_violation(torch.tensor([4.0, 4, 4, 4])).item() == 0.0
    assert max_violation(torch.tensor([16.0, 0, 0, 0])).item() == 3.0  # E - 1
    assert max_violation(torch.zeros(4)).item() == -1.0  # nothing routed: finite


def test_the_worst_layer_is_the_headline() -> None:
    found = reduce_step(step_of(1), 1)
    assert found.sums is not None
    record = routing_record(found.sums, (1, 3))
    assert record["moe/max_violation"] == record["moe/max_violation/layer_01"] == pytest.approx(1.0)
    assert record["moe/max_violation/layer_03"] == pytest.approx(0.5)
    assert record["moe/counts/layer_03"] == [5, 5, 5, 9]
    # population variance of 1, 2, 3, 0 is 1.25, its mean 1.5
    assert record["moe/load_cv2/layer_01"] == pytest.approx(1.25 / 1.5**2)


def test_records_of_steps_to_be_made_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "x": i}) + "\n" for i in range(1, 6)) + '{"step": 6, "x')
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]  # a kill may cut the last line
    drop_records_from(path, 3)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, 2, use_tensorboard=False)
    writer.write(3, {"x": 30})
    writer.close()
    assert [record["x"] for record in read_records(path)] == [1, 2, 30]


def test_dead_experts_are_found_over_the_last_records() -> None:
    record = {"moe/max_violation": 1.0, "moe/counts/layer_01": [2, 0, 2], "moe/counts/layer_03": [1, 1, 1]}
    load = expert_load([record] * 150 + [record | {"moe/max_violation": 2.0}] * 50, (1, 3))
    assert load is not None
    assert load.dead == [(1, 1)] and load.num_records == 100
    assert load.max_violation == pytest.approx(1.5)
    assert load.counts == {1: [200, 0, 200], 3: [100, 100, 100]}
    assert expert_load([], (1,)) is None
