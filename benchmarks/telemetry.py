"""What expert-load telemetry costs of a training step: pairs of blocks of steps, with it and without, in turn.

Two models of the same configuration train in the same processes. One has everything of telemetry: sums formed in the
forward pass and added up, all-to-alls timed, one all-reduce a record, metrics.jsonl and TensorBoard with heat map,
histograms and a scalar an expert. The other has nothing of it (telemetry.experts off, never a record). A block is
telemetry.every steps, so that a block with telemetry writes one record.

    python benchmarks/telemetry.py [--json] [--ranks 2] [--pairs 30] [--config FILE] [--section.field=value ...]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_train.config.errors import EXIT_USAGE, UsageError  # noqa: E402
from moe_train.config.load import load_config  # noqa: E402
from moe_train.config.root import Config, check_world  # noqa: E402
from moe_train.data import PreparedData, prepare_data  # noqa: E402
from moe_train.distributed.addresses import free_port  # noqa: E402
from moe_train.distributed.bootstrap import (  # noqa: E402
    child_environment,
    choose_device,
    discover_world,
    export_world,
    init_process_group,
    leave_process_group,
    set_threads,
)
from moe_train.distributed.world import World  # noqa: E402
from moe_train.train.engine.settings import deepspeed_config  # noqa: E402

TIMEOUT_SECONDS = 3600
WARM_UP_BLOCKS = 2  # of each kind


@dataclass(frozen=True)
class Costs:
    """Block by block.

    Attributes:
        with_telemetry: Wall seconds of each block with telemetry.
        without: Wall seconds of each block without, in the same order.
        cpu_with_telemetry: Processor seconds of all ranks, likewise.
        cpu_without: Likewise.
        recording: Wall seconds of each block that rank 0 spent in the recorder alone, waiting for ranks included.
    """

    with_telemetry: list[float]
    without: list[float]
    cpu_with_telemetry: list[float]
    cpu_without: list[float]
    recording: list[float]


def main() -> int:
    """Start the ranks, or be one; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default: 2)")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of blocks (default: 30)")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"), help="configuration of the run")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args()
    for name in ("ranks", "pairs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} ({getattr(options, name)}) must be 1 or more")
    try:
        if options.rank is None:
            return start_ranks(options)
        return run_rank(options, extra)
    except UsageError as error:
        print(f"telemetry.py: {error}", file=sys.stderr)
        return EXIT_USAGE


def start_ranks(options: argparse.Namespace) -> int:
    """Run every rank as a process of its own; the exit code of the first that failed, else 0."""
    port = free_port()
    ranks = []
    for rank in range(options.ranks):
        place = World(rank, options.ranks, rank, options.ranks, 1, 0, "127.0.0.1", port, "environment")
        environment = child_environment(place, one_thread=True)
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore::FutureWarning", *sys.argv, f"--rank={rank}"], env=environment
            )
        )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        codes = [rank.wait(max(1.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    return next((code for code in codes if code), 0)


def run_rank(options: argparse.Namespace, extra: list[str]) -> int:
    """Measure in this rank; rank 0 prints."""
    with tempfile.TemporaryDirectory(prefix="moe_train_telemetry_") as folder:
        arguments = [f"--config={options.config}", *extra, f"--train.run_dir={folder}"]
        config = load_config(arguments, program="telemetry.py")
        world = discover_world()
        config = check_world(config, world.world_size, world.local_world_size)
        device = choose_device(config.parallel.device, world)
        export_world(world, device)
        config, data = prepare(config, world, device)
        init_process_group(world, device, config.parallel.timeout_seconds)
        costs = measure(config, data, world, device, Path(folder), options.pairs)
    if world.rank == 0:
        report(costs, config, world, options)
    leave_process_group(0)
    return 0


def prepare(config: Config, world: World, device) -> tuple[Config, PreparedData]:
    """The data, and the configuration with what depends on it and on the device."""
    from moe_train.host.precision import resolve_precision

    set_threads(config.parallel.threads_per_rank, world)
    data = prepare_data(
        config.data,
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
        min_sequences=config.train.global_batch_size,
        local_rank=world.local_rank,
        show_progress=False,
    )
    precision = resolve_precision(config.train.precision, device)
    train = config.train.model_copy(update={"precision": precision})
    vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return config.model_copy(update={"train": train, "model": model}), data


def measure(config: Config, data: PreparedData, world: World, device, folder: Path, num_pairs: int) -> Costs:
    """Blocks in turn. Collective: all ranks."""
    from moe_train.distributed.collectives import barrier, gather_objects
    from moe_train.distributed.traffic import TrafficMeter
    from moe_train.train.batches import BatchPlan, micro_batches
    from moe_train.train.engine.build import make_engine

    plan = BatchPlan(config.train.micro_batch_size, config.train.global_batch_size, world.rank, world.world_size)
    settings = deepspeed_config(config, world.world_size, config.train.precision)
    silent = config.model_copy(update={"telemetry": config.telemetry.model_copy(update={"experts": False})})
    meter = TrafficMeter(device)
    engines = {True: make_engine(config, settings, device, meter), False: make_engine(silent, settings, device)}
    recorder = make_recorder(config, plan, meter, folder)
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
                batches = micro_batches(data.train, plan, progress_at(step, plan), mark, device)
                if not is_on:
                    engines[False].train_step(batches, rate)
                    continue
                with recorder.step():
                    result = engines[True].train_step(batches, rate)
                    recorded += timed(recorder.add, result)
            if is_on:
                recorded += timed(record, recorder, progress_at(step + 1, plan), rate, result)
            finish(device)
            barrier()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            if block >= WARM_UP_BLOCKS:
                wall[is_on].append(seconds)
                cpu[is_on].append(sum(gather_objects(cpu_seconds)))
                recording += [recorded] if is_on else []
    recorder.close()
    return Costs(wall[True], wall[False], cpu[True], cpu[False], recording)


def progress_at(step: int, plan):
    """Where a run is after some steps."""
    from moe_train.train.progress import Progress

    return Progress(step, step * plan.global_batch_size)


def record(recorder, progress, rate: float, result) -> None:
    """What the training loop does when a record is due."""
    recorder.measure(progress, rate, result, is_shown=False)
    recorder.write(progress.step, recorder.take(progress.step))


def timed(action, *arguments) -> float:
    """Wall seconds of a call."""
    began = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - began


def finish(device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def make_recorder(config: Config, plan, meter, folder: Path):
    """What `moe-train train` records with."""
    from moe_train.train.console import RunConsole
    from moe_train.train.telemetry.load_alarms import Bounds, LoadAlarms
    from moe_train.train.telemetry.recorder import StepRecorder
    from moe_train.train.telemetry.writer import MetricsWriter

    writer = watch = None
    layers = config.model.moe_layer_indices
    if plan.rank == 0:
        writer = MetricsWriter(folder, 0, use_tensorboard=True, say=print)
        writer.describe(layers, [], "")
        watch = LoadAlarms(layers, Bounds.of(config.telemetry, config.model.moe))
    return StepRecorder(config, plan, RunConsole(None), meter, writer, watch)


def report(costs: Costs, config: Config, world: World, options: argparse.Namespace) -> None:
    """Print the ratios."""
    figures = {
        "ranks": world.world_size,
        "pairs": len(costs.without),
        "steps_per_block": config.telemetry.every,
        "step_ms_without": statistics.median(costs.without) / config.telemetry.every * 1e3,
        "recording": statistics.median(ours / block for ours, block in zip(costs.recording, costs.with_telemetry)),
        "overhead": overhead(costs.with_telemetry, costs.without),
        "cpu_overhead": overhead(costs.cpu_with_telemetry, costs.cpu_without),
    }
    wall, cpu = figures["overhead"], figures["cpu_overhead"]
    print(
        f"{figures['pairs']} pairs of blocks of {figures['steps_per_block']} steps on {world.world_size} ranks, "
        f"{figures['step_ms_without']:.0f} ms a step without telemetry\n"
        f"telemetry costs {wall['median']:+.2%} of the wall time ({wall['lower']:+.2%} to {wall['upper']:+.2%}), "
        f"{cpu['median']:+.2%} of the processor time ({cpu['lower']:+.2%} to {cpu['upper']:+.2%})\n"
        f"(medians and quartiles over pairs); {figures['recording']:.2%} of it is spent in the recorder itself"
    )
    if options.json:
        print(json.dumps(figures | {"blocks": asdict(costs)}))


def overhead(with_telemetry: list[float], without: list[float]) -> dict[str, float]:
    """Median and quartiles over pairs of (with / without - 1)."""
    ratios = [ours / theirs - 1 for ours, theirs in zip(with_telemetry, without, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios) if len(ratios) > 1 else median, "lower": lower, "upper": upper}


if __name__ == "__main__":
    sys.exit(main())
