"""The recorder: what it waits for between records, what it shows, and what a record covers."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.config import Config
from moe_train.model.build import ExpertPlacement
from moe_train.model.moe.balance import make_balance_terms, make_bias_rule
from moe_train.model.transformer import TrainingObjective
from moe_train.parallel.collectives import world_group
from moe_train.parallel.groups import create_expert_groups
from moe_train.parallel.traffic import TrafficMeter
from moe_train.train.alarms import Bounds, ExpertWatch
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole
from moe_train.train.engine import StepResult
from moe_train.train.recorder import StepRecorder
from moe_train.train.records import read_records
from moe_train.train.telemetry import MetricsWriter
from tests.model.small import random_ids, small_config, small_model, tokens_of
from tests.ranks import RankPool
from tests.train.test_step_window import result_of

CPU = torch.device("cpu")
WAITING = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
MOE = {
    "num_experts": 4,
    "top_k": 2,
    "router": "noisy_topk",
    "switch_aux_coef": 0.1,
    "z_loss_coef": 0.1,
    "bias_update_rate": 0.1,
}


class _Scalars(TorchDispatchMode):
    """Counts reads of single values by operations."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._found["scalar"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[Counter]:
    """Counts what would make the host wait for a device: numbers read from tensors, and copies to the host."""
    found: Counter = Counter()
    originals = {name: getattr(torch.Tensor, name) for name in WAITING}

    def counting(name: str) -> Callable:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return originals[name](self, *args, **kwargs)

        return method

    for name in WAITING:
        setattr(torch.Tensor, name, counting(name))
    try:
        with _Scalars(found):
            yield found
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def waits_of_a_step(rank: int, world_size: int, is_recorded: bool) -> dict[str, int]:
    """What a step between two records waits for, on one rank, with telemetry or without."""
    meter = TrafficMeter(CPU) if is_recorded else None
    placement = ExpertPlacement(meter=meter)
    if world_size > 1:
        groups = create_expert_groups(world_size, timeout_seconds=60)
        placement = ExpertPlacement(groups.ep_rank, world_size, groups.ep_group, meter=meter)
    config = small_config(moe_every=1, moe=MOE)
    model = small_model(config, placement=placement, dtype=torch.float32, measures=is_recorded)
    terms, rule = make_balance_terms(config.moe), make_bias_rule(config.moe)
    objective = TrainingObjective(model, terms, world_group(), rule)
    recorder = StepRecorder(some_config(), BatchPlan(2, 4, rank, world_size), RunConsole(None), meter, None, None)
    ids = random_ids(2, 8)
    with counted_waits() as found:
        for step in range(2):
            with recorder.step():
                losses = objective(tokens_of(ids, step=step), ids)
                losses.total.backward()
                objective.after_step(losses.sums.counts, step)
                norm = torch.zeros(())
                recorder.add(StepResult(losses.total, losses.cross_entropy, losses.sums, norm, skipped=False))
    return dict(found)


def some_config() -> Config:
    return Config.model_validate({"train": {"run_dir": "unused", "sequence_length": 8, "steps": 4}})


def test_between_records_nothing_is_waited_for() -> None:
    assert waits_of_a_step(0, 1, is_recorded=True) == waits_of_a_step(0, 1, is_recorded=False) == {}


def test_on_several_ranks_only_the_split_sizes_are(pool2: RankPool) -> None:
    recorded = pool2.run(waits_of_a_step, True, timeout=60)
    assert recorded == pool2.run(waits_of_a_step, False, timeout=60)
    assert recorded[0] == {"tolist": 2 * 4}  # of two steps and four MoE layers


def test_the_counter_would_see_a_wait() -> None:
    with counted_waits() as found:
        x = torch.ones(3)
        float(x[0])
        x.tolist()
        if x.sum() > 1:
            x.cpu()
    assert found["__float__"] == found["tolist"] == found["__bool__"] == found["cpu"] == 1 and found["scalar"] >= 2


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[StepRecorder, Path]:
    """A recorder that writes, of two layers."""
    config = Config.model_validate(
        {
            "model": {"num_layers": 4, "moe": {"num_experts": 4}},
            "train": {"run_dir": str(tmp_path), "sequence_length": 8},
        }
    )
    watch = ExpertWatch((1, 3), Bounds(dead_after_steps=4, max_violation=9, entropy=0.0, after_steps=9))
    writer = MetricsWriter(tmp_path, 0, use_tensorboard=False)
    plan = BatchPlan(2, 4, 0, 1)
    return StepRecorder(config, plan, RunConsole(None), TrafficMeter(CPU), writer, watch), tmp_path


def test_a_record_covers_the_steps_since_the_last(recorded: tuple[StepRecorder, Path]) -> None:
    recorder, folder = recorded
    for step in range(6):
        with recorder.step():
            result = result_of(0, step)
            recorder.add(result)
        if step == 1:  # shown, but not written: what was added up goes on
            assert recorder.measure(step + 1, 0.1, result, is_shown=True).window.num_steps == 2
        if step in (2, 5):
            recorder.measure(step + 1, 0.1, result, is_shown=False)
            recorder.write(step + 1, recorder.take(step + 1))
    recorder.close()
    first, second = read_records(folder / "metrics.jsonl")
    assert (first["step"], second["step"]) == (3, 6) and first["moe/steps"] == second["moe/steps"] == 3
    assert first["moe/counts/layer_03"] == [15, 15, 15, 15 + 0 + 1 + 2]
    assert second["moe/counts/layer_03"] == [15, 15, 15, 15 + 3 + 4 + 5]
    assert first["train/tokens"] == 3 * 4 * 8
    # Expert 3 of layer 1 has had no token: dead after four steps.
    assert first["moe/dead_experts"] == 0 and "moe/alarms" not in first
    assert second["moe/dead_experts"] == second["moe/dead_experts/layer_01"] == 1
    assert second["moe/alarms"] == ["layer 01, expert 3: no token for 6 steps"]
