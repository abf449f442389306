"""The recorder: what it waits for between records, what it shows, and what a record covers."""

import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.config.root import Config
from moe_train.distributed.collectives import world_group
from moe_train.distributed.mesh import create_mesh
from moe_train.distributed.traffic import TrafficMeter
from moe_train.model.build import ExpertPlacement
from moe_train.model.moe.balance.build import make_balance_terms, make_bias_rule
from moe_train.model.objective import TrainingObjective
from moe_train.model.step_size import StepSize
from moe_train.ops import routed_mlp
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole
from moe_train.train.progress import Progress
from moe_train.train.step_result import StepResult
from moe_train.train.telemetry.load_alarms import Bounds, LoadAlarms
from moe_train.train.telemetry.metrics_window import StepWindow
from moe_train.train.telemetry.recorder import FlopsReference, StepRecorder
from moe_train.train.telemetry.records import read_records
from moe_train.train.telemetry.writer import MetricsWriter
from tests.model.small import random_ids, small_config, small_model, tokens_of
from tests.ranks import RankPool
from tests.train.telemetry.test_metrics_window import result_of

CPU = torch.device("cpu")
WAITING = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
# Operations whose result's size or value the host must know.
WAITING_OPS = (
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "masked_select",
    "_unique2",
    "unique_dim",
    "equal",
    "is_nonzero",
)
MOE = {
    "num_experts": 4,
    "top_k": 2,
    "router": "noisy_topk",
    "switch_aux_coef": 0.1,
    "z_loss_coef": 0.1,
    "bias_update_rate": 0.1,
}


class _WaitingOps(TorchDispatchMode):
    """Counts operations that wait for their operands, in the backward pass too."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else []
        masks = any(index is not None and index.dtype == torch.bool for index in indices)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING_OPS or masks or unsized:
            self._found[name] += 1
        return func(*args, **kwargs)


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
        with _WaitingOps(found):
            yield found
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def at(step: int) -> Progress:
    """After some steps of 4 sequences."""
    return Progress(step, step * 4)


def waits_of_a_step(rank: int, world_size: int, is_recorded: bool, moe: dict[str, Any] = MOE) -> dict[str, int]:
    """What a step between two records waits for, on one rank, with telemetry or without."""
    meter = TrafficMeter(CPU) if is_recorded else None
    placement = ExpertPlacement(meter=meter)
    if world_size > 1:
        mesh = create_mesh(world_size, timeout_seconds=60)
        placement = ExpertPlacement(mesh.expert.rank, world_size, mesh.dispatch_groups, meter=meter)
    config = small_config(moe_every=1, moe=moe)
    model = small_model(config, placement=placement, dtype=torch.float32, measures=is_recorded)
    terms, rule = make_balance_terms(config.moe), make_bias_rule(config.moe)
    objective = TrainingObjective(model, terms, world_group(), rule)
    recorder = StepRecorder(some_config(), BatchPlan(2, 4, rank, world_size), RunConsole(None), meter, None, None)
    ids, size = random_ids(2, 8), StepSize(2 * world_size, 32 * world_size, 32 * world_size)
    # The experts as a CUDA device computes them; on CPU, where counts need no waiting for, they are read.
    as_on_cuda = unittest.mock.patch.object(routed_mlp, "_is_by_expert", lambda *_: False)
    with as_on_cuda, counted_waits() as found:
        for step in range(2):
            with recorder.step():
                losses = objective(tokens_of(ids, step=step), ids, size)
                losses.total.backward()
                objective.after_step(losses.sums, step, size, skipped=False)
                norm = torch.zeros(())
                recorder.add(StepResult(losses.total, losses.cross_entropy, losses.sums, norm, skipped=False))
    return dict(found)


def some_config() -> Config:
    return Config.model_validate({"train": {"run_dir": "unused", "sequence_length": 8, "steps": 4}})


def test_between_records_nothing_is_waited_for() -> None:
    assert waits_of_a_step(0, 1, is_recorded=True) == waits_of_a_step(0, 1, is_recorded=False) == {}


def test_with_a_capacity_only_the_number_of_rows_is() -> None:
    moe = MOE | {"capacity_factor": 1.0, "input_jitter": 0.1}
    recorded = waits_of_a_step(0, 1, True, moe)
    assert recorded == waits_of_a_step(0, 1, False, moe) == {"tolist": 2 * 4}  # of two steps and four MoE layers


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
        x[x > 0]
        x.masked_select(x > 0)
        (x > 0).nonzero()
        torch.bincount(x.long())
        x.unique()
        torch.equal(x, x)
        x.repeat_interleave(x.long())
        x[torch.tensor([0, 1])]  # these two do not
        x.repeat_interleave(x.long(), output_size=3)
    for name in (
        "__float__",
        "tolist",
        "__bool__",
        "cpu",
        "masked_select",
        "bincount",
        "_unique2",
        "repeat_interleave",
    ):
        assert found[name] == 1, (name, found)
    assert found["index"] == 1 and found["nonzero"] >= 1 and found["equal"] == 1 and found["_local_scalar_dense"] >= 2


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[StepRecorder, Path]:
    """A recorder that writes, of two layers."""
    config = Config.model_validate(
        {
            "model": {"num_layers": 4, "moe": {"num_experts": 4}},
            "train": {"run_dir": str(tmp_path), "sequence_length": 8},
        }
    )
    watch = LoadAlarms((1, 3), Bounds(dead_after_steps=4, max_violation=9, entropy=0.0, after_steps=9))
    writer = MetricsWriter(tmp_path, 0, {}, say=print)
    plan = BatchPlan(2, 4, 0, 1)
    return StepRecorder(config, plan, RunConsole(None), TrafficMeter(CPU), writer, watch), tmp_path


def test_a_record_covers_the_steps_since_the_last(recorded: tuple[StepRecorder, Path]) -> None:
    recorder, folder = recorded
    for step in range(6):
        with recorder.step():
            result = result_of(0, step)
            recorder.add(result)
        if step == 1:  # shown, but not written: what was added up goes on
            assert recorder.measure(at(step + 1), 0.1, result, is_shown=True).window.num_steps == 2
        if step in (2, 5):
            recorder.measure(at(step + 1), 0.1, result, is_shown=False)
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


def test_times_are_of_steps_and_traffic_of_ranks(recorded: tuple[StepRecorder, Path], monkeypatch) -> None:
    """Milliseconds of a step and of its all-to-alls, by a clock that the test moves."""
    recorder, folder = recorded
    now = [10.0]
    monkeypatch.setattr("moe_train.train.telemetry.recorder.time.monotonic", lambda: now[0])
    monkeypatch.setattr("moe_train.distributed.traffic.time.perf_counter", lambda: now[0])
    for step in range(4):
        with recorder.step():
            now[0] += 1.5
            with recorder._meter.measure(1000):
                now[0] += 0.5
            recorder.add(result_of(0, step))
        now[0] += 100.0  # between steps: validation, saving
        if step in (1, 3):
            if step == 3:  # what the host waits for in the reduction is the steps' own time
                monkeypatch.setattr(recorder._window, "reduce", waiting(recorder._window.reduce, now, 4.0))
            recorder.measure(at(step + 1), 0.1, result_of(0, step), is_shown=False)
            recorder.write(step + 1, recorder.take(step + 1))
    recorder.close()
    first, second = read_records(folder / "metrics.jsonl")
    assert first["perf/step_ms"] == pytest.approx(2000) and second["perf/step_ms"] == pytest.approx(4000)
    assert first["perf/tokens_per_second"] == pytest.approx(4 * 8 / 2.0)
    for line in (first, second):
        assert line["moe/all_to_all_ms"] == pytest.approx(500) and line["moe/all_to_all_bytes"] == 1000
    assert first["moe/all_to_all_fraction"] == pytest.approx(0.25)
    assert second["moe/all_to_all_fraction"] == pytest.approx(0.125)


def test_speed_in_operations(recorded: tuple[StepRecorder, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, _ = recorded
    now = [0.0]
    monkeypatch.setattr("moe_train.train.telemetry.recorder.time.monotonic", lambda: now[0])
    recorder._reference = FlopsReference(flops_per_token=3e9, peak_flops=48e9)
    with recorder.step():
        now[0] += 2.0
        recorder.add(result_of(0))
    recorder.measure(at(1), 0.1, result_of(0), is_shown=False)
    record = recorder.take(1)
    per_rank = 4 * 8 * 3e9 / 2.0 / recorder._plan.world_size  # a step of 4 sequences of 8 tokens in 2 s
    assert record["perf/tflops"] == pytest.approx(per_rank / 1e12)
    assert record["perf/mfu"] == pytest.approx(per_rank / 48e9)


def waiting(action: Callable, now: list[float], seconds: float) -> Callable:
    def act(*arguments: Any) -> Any:
        now[0] += seconds
        return action(*arguments)

    return act


def test_a_skipped_step_is_not_in_the_sums(recorded: tuple[StepRecorder, Path]) -> None:
    recorder, _ = recorded
    results = [result_of(0), replace(result_of(0), skipped=True), replace(result_of(0), skipped=True)]
    for i, result in enumerate(results):
        with recorder.step():
            recorder.add(result)
        if i == 1:
            assert recorder.measure(at(i + 1), 0.1, result, is_shown=False).window.num_steps == 1
            assert recorder.take(i + 1)["moe/steps"] == 1
    assert recorder.measure(at(3), 0.1, results[2], is_shown=False).window is None  # nothing but skipped steps
    record = recorder.take(3)
    assert "moe/steps" not in record and record["train/loss"] == 2.0


def reduce_traffic(rank: int, world_size: int) -> tuple[float, float]:
    meter = TrafficMeter(CPU)
    window = StepWindow(meter)
    meter._seconds, meter._num_bytes = 2.0 + rank, 100 * (rank + 1)
    for _ in range(2):
        window.add(result_of(rank))
    found = window.reduce(result_of(rank), rank, world_size).window
    assert found is not None
    return found.all_to_all_seconds, found.all_to_all_bytes


def test_traffic_is_a_step_and_a_rank(pool2: RankPool) -> None:
    # Seconds: the mean of 2 and 3 over two steps; bytes: 100 + 200 over two steps.
    assert pool2.run(reduce_traffic) == [(1.25, 150.0)] * 2
