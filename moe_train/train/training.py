"""Training of a prepared run: connect the ranks, load the newest checkpoint, take the steps, report the result.

Read `train_prepared` first. `_build` makes all parts of a run.
"""

import contextlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace

from moe_train.checkpoint.folders import Retention, remove_leftovers
from moe_train.checkpoint.reader import load_checkpoint
from moe_train.checkpoint.resume_point import ResumePoint, find_initial_weights, find_resume_point, quarantine_damaged
from moe_train.checkpoint.writer import CheckpointWriter
from moe_train.config.base import field_values
from moe_train.config.errors import RunFailed, UsageError
from moe_train.config.load import dump_yaml
from moe_train.config.parts import read_section
from moe_train.config.registry import load_part
from moe_train.config.run import TelemetryConfig
from moe_train.distributed.bootstrap import init_process_group
from moe_train.distributed.collectives import Group, barrier
from moe_train.distributed.consensus import run_on_all_ranks
from moe_train.distributed.kernel_agreement import agree_on_kernels
from moe_train.distributed.mesh import create_background_group
from moe_train.distributed.traffic import TrafficMeter
from moe_train.distributed.world import check_nodes
from moe_train.host.memory import frozen_garbage
from moe_train.host.peak import peak_flops
from moe_train.host.versions import versions
from moe_train.liveness.health import Health, connect
from moe_train.liveness.signals import StopSignals
from moe_train.model.compiled import check_compiler
from moe_train.model.count import count_parameters
from moe_train.model.flops import training_flops_per_token
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole
from moe_train.train.engine.build import make_engine, sharing_ranks
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.loop import Run, TrainResult, train
from moe_train.train.preparation import PreparedRun
from moe_train.train.progress import Progress, progress_at
from moe_train.train.rank_log import RankLog
from moe_train.train.recovery import Recovery
from moe_train.train.remarks import remarks
from moe_train.train.resume import check_resumable, check_same_meaning, describe_changes, split_warnings
from moe_train.train.run_folder import RunFolder, save_config, save_tokenizer
from moe_train.train.run_lock import RunLock, acquire_together
from moe_train.train.saving import Saver
from moe_train.train.step_control import StepControl
from moe_train.train.summary import make_summary, show_summary, write_summary
from moe_train.train.telemetry.compared_fields import compared_fields
from moe_train.train.telemetry.load_alarms import Bounds, LoadAlarms
from moe_train.train.telemetry.recorder import FlopsReference, StepRecorder
from moe_train.train.telemetry.records import read_records
from moe_train.train.telemetry.sinks.base import Sink, SinkSpec
from moe_train.train.telemetry.writer import MetricsWriter
from moe_train.train.tracing import StepTracer

Sampler = Callable[[Run], str | None]


def train_prepared(prepared: PreparedRun, log: RankLog, sample: Sampler) -> TrainResult:
    """Train to the end of the run, or until a signal asks to stop.

    Args:
        prepared: Run prepared on this rank, from `prepare_run`.
        log: Log of this rank, with the streams for what rank 0 shows, and for reports of hanging steps and lost ranks.
        sample: Function that draws the text of the closing summary.

    Raises:
        UsageError: If ranks differ in what must be the same, or the checkpoint does not fit the configuration.
        RunFailed: If the run fails for any other reason; it names the reason and the log.

    Collective: All ranks.
    """
    config, world = prepared.config, prepared.world
    console = RunConsole(log.output if world.rank == 0 else None)
    layout = f"{world.world_size} x {prepared.device.type} ({world.launcher}), {config.train.precision}"
    layout += f", expert parallel {config.parallel.expert_parallel_size}, ZeRO {config.parallel.zero_stage}"
    if config.parallel.context_parallel_size > 1:
        layout += f", context parallel {config.parallel.context_parallel_size}"
    console.say(f"moe_train: {layout}; run folder {config.train.run_dir}")
    if config.optim.router_lr_factor != 1.0:
        console.say(f"learning rate of the routers: {config.optim.router_lr_factor:.3g} x optim.learning_rate")
    for line in remarks(config, has_held_out=prepared.data.held_out is not None):
        console.say(f"remark: {line}")

    def warn(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(text, file=log.errors, flush=True)

    init_process_group(world, prepared.device, config.collective_seconds(prepared.device.type), warn)
    agree_on_kernels(prepared.device, console.say)
    if config.train.compile:
        run_on_all_ranks(lambda: check_compiler(prepared.device))
    lock = RunLock(prepared.folder.root)
    health = connect(
        world.master_addr,
        world.rank,
        world.world_size,
        step_timeout_seconds=config.train.step_timeout_seconds,
        peer_timeout_seconds=config.parallel.peer_timeout_seconds,
        streams=(sys.stderr, log.errors),
    )
    try:
        result = _train_watched(prepared, lock, health, console, log, sample)
    except UsageError as error:
        health.peers.fail(str(error))  # most often all ranks find the error; none must wait for one that has left
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):
            traceback.print_exc()  # to the log, before others are asked
        reason, code = health.explain(error)
        raise RunFailed(f"rank {world.rank}: {reason}; its log is {log.path}", code) from error
    finally:
        health.watchdog.stop()
        lock.release()
    health.leave()
    return result


def _train_watched(
    prepared: PreparedRun, lock: RunLock, health: Health, console: RunConsole, log: RankLog, sample: Sampler
) -> TrainResult:
    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(f"rank {prepared.world.rank}: {text}", file=log.errors, flush=True)

    group = create_background_group()
    # Before signals wait for the end of a step: one that comes while this start waits for another run ends it at once.
    waited_for = acquire_together(lock, prepared.world.rank, prepared.config.train.lock_wait_seconds, console.say)
    log.begin()
    with StopSignals(say) as signals:
        try:
            point = _agree(prepared, group)
            if waited_for and point.manifest is not None and point.manifest.step == prepared.config.train.steps:
                raise UsageError(
                    f"train.run_dir ({prepared.config.train.run_dir!r}): another run ({waited_for}) took all "
                    f"{point.manifest.step} steps (train.steps) while this start waited for it; nothing is left to do"
                )
            run, first = _build(prepared, lock, point, health, signals, console, group)
            with frozen_garbage():
                result = train(run, first)
        except BaseException:
            signals.ignore()  # this rank has yet to say why it ends
            raise
        if result.stopped is not None:
            signals.ignore()
    if result.stopped is not None:
        console.say(f"stopped by {result.stopped}; saved in {result.checkpoint}: the same command goes on from there")
    else:
        _conclude(run, result, sample(run))
    run.recorder.close()
    run.engine.close()
    barrier()  # no rank leaves while another still needs its experts or its store
    return result


def _agree(prepared: PreparedRun, group: Group | None) -> ResumePoint:
    """Find the checkpoint to resume from, and check that versions, configuration and data are the same on all ranks."""
    config, world, folder = prepared.config, prepared.world, prepared.folder

    def tidy() -> None:
        check_nodes(config.parallel.node_size, world)
        if world.rank == 0:
            read_records(folder.metrics)  # a damaged file is reported before the run begins
            remove_leftovers(folder.checkpoints)

    def describe(_: None) -> dict[str, str]:
        return {
            **versions(),
            **{name: str(value) for name, value in field_values(config.model_dump(mode="json"))},
            "the data": " ".join(folder.name for folder in prepared.data.cache_dirs),
        }

    run_on_all_ranks(tidy, describe)
    point = find_resume_point(config.checkpoint.resume, folder.checkpoints, world.rank, world.world_size, group)
    fingerprint = prepared.data.tokenizer.fingerprint
    if point.manifest is not None:
        check_resumable(point.manifest, config, fingerprint)
    elif config.checkpoint.init_from is not None:
        initial = find_initial_weights(config.checkpoint.init_from, world.rank, world.world_size, group)
        check_same_meaning(initial, config, fingerprint)
        point = replace(point, initial=initial)
    return point


def _build(
    prepared: PreparedRun,
    lock: RunLock,
    point: ResumePoint,
    health: Health,
    signals: StopSignals,
    console: RunConsole,
    group: Group | None,
) -> tuple[Run, Progress]:
    """Make all parts of the run, and load its checkpoint; `group` is for checkpoints. Collective: All ranks."""
    config, world, folder, device = prepared.config, prepared.world, prepared.folder, prepared.device
    layers = config.model.moe_layer_indices
    meter = TrafficMeter(device) if config.telemetry.experts and layers else None
    engine = make_engine(config, device, meter, health.flight_recorder)
    first = _restore(prepared, lock, point, engine, console, group)
    for warning in split_warnings(config, point.manifest):
        console.say(f"warning: {warning}")
    metrics, alarms = _open_metrics(prepared, lock, first.step, console) if world.rank == 0 else (None, None)
    flops = training_flops_per_token(config.model, config.model.vocab_size, config.train.sequence_length)
    # On all ranks at once: those of a CPU share its cores.
    reference = FlopsReference(flops, peak_flops(device, config.train.precision))
    train, copies = config.train, config.model.hidden_copies.copies
    sharing = sharing_ranks(config, engine.mesh, health.flight_recorder)
    plan = BatchPlan(train.micro_batch_size, train.global_batch_size, world.rank, world.world_size, copies, sharing)
    recorder = StepRecorder(config, plan, console, meter, metrics, alarms, reference)
    # Rank 0's clock decides for all: clocks differ, and a save needs all ranks.
    longest = 60 * config.checkpoint.every_minutes if world.rank == 0 else 0.0
    retention = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
    writer = CheckpointWriter(folder.checkpoints, world.rank, group, retention, lock.writing)
    step_control = StepControl(
        max_norm_ratio=config.train.max_grad_norm_ratio,
        max_skipped=config.train.max_skipped_steps,
        rank=world.rank,
        received=lambda: signals.received,
        save_is_done=lambda: writer.is_done,
        save_is_due=lambda: 0 < longest <= writer.seconds_since_start,
        state=point.manifest.step_control if point.manifest is not None else None,
    )
    saver = Saver(config, engine, writer, step_control, plan, prepared.data, console)
    return Run(
        config=config,
        folder=folder,
        lock=lock,
        data=prepared.data,
        engine=engine,
        plan=plan,
        device=device,
        console=console,
        recorder=recorder,
        flight_recorder=health.flight_recorder,
        step_control=step_control,
        saver=saver,
        recovery=Recovery(
            engine,
            step_control,
            saver,
            recorder,
            console,
            plan,
            train.sequence_length,
            folder.checkpoints,
            layers,
            group,
            point.manifest,
        ),
        watchdog=health.watchdog,
        tracer=StepTracer(folder.profile(world.rank), config.train.profile_steps, device.type == "cuda", console.say),
    ), first


def _restore(
    prepared: PreparedRun,
    lock: RunLock,
    point: ResumePoint,
    engine: TrainEngine,
    console: RunConsole,
    group: Group | None,
) -> Progress:
    """Load the checkpoint, if there is one. Collective: All ranks."""
    manifest, config = point.manifest, prepared.config
    if point.initial is not None:
        load_checkpoint(engine, point.initial, group, weights_only=True)
        console.say(f"the weights of {point.initial.folder} ({point.initial.step} steps), at step 0 of this run")
    if manifest is None:
        return Progress()
    load_checkpoint(engine, manifest, group)
    lock.check()
    for line in quarantine_damaged(point, prepared.world.rank):
        console.say(line)
    left = config.train.steps - manifest.step
    console.say(f"going on from {manifest.folder}: {manifest.step} steps done, {left} to do")
    for line in describe_changes(manifest, config, prepared.data.sources):
        console.say(f"  {line}")
    return progress_at(manifest, config.train.sequence_length)


def _open_metrics(
    prepared: PreparedRun, lock: RunLock, first_step: int, console: RunConsole
) -> tuple[MetricsWriter, LoadAlarms | None]:
    config, folder, layers = prepared.config, prepared.folder, prepared.config.model.moe_layer_indices
    with lock.writing():
        save_config(folder, config)
        save_tokenizer(folder, prepared.data.tokenizer)
        sinks = open_sinks(config.telemetry, folder, first_step)
        writer = MetricsWriter(folder.root, first_step, sinks, console.say, lock.writing)
    writer.describe(layers if config.telemetry.experts else (), compared_fields(config), dump_yaml(config))
    if not (config.telemetry.experts and layers):
        return writer, None
    bounds = Bounds.of(config.telemetry, config.model.moe, config.optim.warmup_steps)
    return writer, LoadAlarms(layers, bounds, read_records(folder.metrics))


def open_sinks(telemetry: TelemetryConfig, folder: RunFolder, first_step: int) -> dict[str, Sink]:
    """Open the sinks that a configuration names.

    Args:
        telemetry: Telemetry section of the configuration.
        folder: Folder of the run.
        first_step: Number of steps that are done.

    Returns:
        The sinks by their names.

    Raises:
        UsageError: If a sink of another package cannot be imported.
    """
    sinks = {}
    for name in telemetry.active_sinks:
        kind = load_part("sinks", name)
        section = read_section(kind.section, telemetry.part_settings.get(name), f"telemetry.{name}")
        sinks[name] = kind.open(SinkSpec(folder.root, first_step, section))
    return sinks


def _conclude(run: Run, result: TrainResult, sample: str | None) -> None:
    """Write and show the closing summary on rank 0."""
    if run.plan.rank == 0:
        model = run.config.model
        summary = make_summary(run, result, count_parameters(model, model.vocab_size), sample)
        try:
            with run.lock.writing():
                write_summary(run.folder.summary, summary)
        except OSError as error:  # all that was trained is saved
            run.console.say(f"warning: {run.folder.summary} could not be written: {error}")
        show_summary(run, summary)
