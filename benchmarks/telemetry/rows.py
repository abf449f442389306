"""A rank of the telemetry benchmark: trains blocks of steps with telemetry and without, and tells what each took.

python -m benchmarks.telemetry.rows FOLDER PAIRS [options of moe-train train]
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_train.config.load import load_config
from moe_train.config.resolve import ResolvedConfig
from moe_train.distributed.bootstrap import discover_world, init_process_group, leave_process_group
from moe_train.distributed.collectives import barrier, gather_objects
from moe_train.distributed.traffic import TrafficMeter
from moe_train.plan.room import check_room
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.console import RunConsole
from moe_train.train.engine.build import make_engine
from moe_train.train.preparation import PreparedRun, prepare_run
from moe_train.train.progress import Progress
from moe_train.train.run_folder import RunFolder
from moe_train.train.telemetry.load_alarms import Bounds, LoadAlarms
from moe_train.train.telemetry.recorder import StepRecorder
from moe_train.train.telemetry.writer import MetricsWriter
from moe_train.train.training import open_sinks

WARM_UP_BLOCKS = 2  # of each kind


@dataclass(frozen=True)
class Costs:
    """What blocks took, in the order of the blocks.

    Attributes:
        with_telemetry: Wall seconds of each block with telemetry.
        without: Wall seconds of each block without.
        cpu_with_telemetry: Processor seconds of each block with telemetry, all ranks.
        cpu_without: Processor seconds of each block without, all ranks.
        recording: Wall seconds of each block that rank 0 spent in the recorder alone, waiting for ranks included.
    """

    with_telemetry: list[float]
    without: list[float]
    cpu_with_telemetry: list[float]
    cpu_without: list[float]
    recording: list[float]


def main(arguments: Sequence[str]) -> int:
    """Measure; rank 0 writes costs.json into the folder. Collective: all ranks.

    Args:
        arguments: Folder, number of pairs, and options of `moe-train train`.
    """
    folder, num_pairs = Path(arguments[0]), int(arguments[1])
    config = load_config([*arguments[2:], f"--train.run_dir={folder}"], program="benchmarks.telemetry")
    prepared = prepare_run(config, discover_world(), check_room)
    init_process_group(prepared.world, prepared.device, config.parallel.timeout_seconds)
    costs = measure(prepared, num_pairs)
    if prepared.world.rank == 0:
        (folder / "costs.json").write_text(json.dumps(asdict(costs)), encoding="utf-8")
    leave_process_group(0)
    return 0


def measure(prepared: PreparedRun, num_pairs: int) -> Costs:
    """Train blocks in turn. Collective: all ranks.

    Args:
        prepared: Run whose model is trained, with telemetry and without.
        num_pairs: Pairs of blocks that count.
    """
    config, data, world, device = prepared.config, prepared.data, prepared.world, prepared.device
    plan = BatchPlan(config.train.micro_batch_size, config.train.global_batch_size, world.rank, world.world_size)
    silent = config.model_copy(update={"telemetry": config.telemetry.model_copy(update={"experts": False})})
    meter = TrafficMeter(device)
    engines = {True: make_engine(config, device, meter), False: make_engine(silent, device)}
    recorder, size = make_recorder(config, plan, meter), plan.step_size(config.train.sequence_length)
    mark = data.tokenizer.end_of_document if config.model.isolate_documents else None
    wall: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    recording = []
    rate = config.optim.learning_rate / 10
    for block in range(num_pairs + WARM_UP_BLOCKS):
        for is_on in (True, False):
            barrier()
            began, cpu_began, recorded = time.perf_counter(), time.process_time(), 0.0
            for step in range(block * config.telemetry.every, (block + 1) * config.telemetry.every):
                batches = micro_batches(data.train, plan, _progress_at(step, plan), mark, device)
                if not is_on:
                    engines[False].train_step(batches, size, rate)
                    continue
                with recorder.step():
                    result = engines[True].train_step(batches, size, rate)
                    recorded += _timed(recorder.add, result)
            if is_on:
                recorded += _timed(_record, recorder, _progress_at(step + 1, plan), rate, result)
            if device.type == "cuda":
                torch.cuda.synchronize()
            barrier()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            if block >= WARM_UP_BLOCKS:
                wall[is_on].append(seconds)
                cpu[is_on].append(sum(gather_objects(cpu_seconds)))
                recording += [recorded] if is_on else []
    recorder.close()
    return Costs(wall[True], wall[False], cpu[True], cpu[False], recording)


def make_recorder(config: ResolvedConfig, plan: BatchPlan, meter: TrafficMeter) -> StepRecorder:
    """Build what `moe-train train` records with; it writes into the run folder."""
    writer = watch = None
    layers = config.model.moe_layer_indices
    if plan.rank == 0:
        folder = RunFolder(Path(config.train.run_dir))
        writer = MetricsWriter(folder.root, 0, open_sinks(config.telemetry, folder, 0), say=print)
        writer.describe(layers, {}, "")
        watch = LoadAlarms(layers, Bounds.of(config.telemetry, config.model.moe))
    return StepRecorder(config, plan, RunConsole(None), meter, writer, watch)


def _progress_at(step: int, plan: BatchPlan) -> Progress:
    return Progress(step, step * plan.global_batch_size)


def _record(recorder: StepRecorder, progress: Progress, rate: float, result: Any) -> None:
    """Do what the training loop does when a record is due."""
    recorder.measure(progress, rate, result, is_shown=False)
    recorder.write(progress.step, recorder.take(progress.step))


def _timed(action: Callable[..., object], *arguments: Any) -> float:
    """Wall seconds of a call."""
    began = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
