"""Putting a run together for `moe-train train`: the model and its state, the records, and what keeps it alive.

It imports all that training needs, so that cli/train.py imports it only when the device is known.
"""

from dataclasses import dataclass

import torch

from moe_train.checkpoint.folders import Retention
from moe_train.checkpoint.reader import load_checkpoint
from moe_train.checkpoint.resume_point import ResumePoint, quarantine_damaged
from moe_train.checkpoint.writer import CheckpointWriter
from moe_train.config.base import field_values
from moe_train.config.load import dump_yaml
from moe_train.config.root import Config
from moe_train.data import PreparedData
from moe_train.distributed.collectives import Group
from moe_train.distributed.traffic import TrafficMeter
from moe_train.distributed.world import World
from moe_train.host.peak import peak_flops
from moe_train.liveness.health import Health
from moe_train.liveness.signals import StopSignals
from moe_train.model.flops import training_flops_per_token
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole
from moe_train.train.engine.build import make_engine
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.engine.settings import deepspeed_config
from moe_train.train.loop import Run
from moe_train.train.progress import Progress
from moe_train.train.recovery import Recovery
from moe_train.train.resume import changed_fields
from moe_train.train.run_folder import RunFolder, save_config, save_tokenizer
from moe_train.train.saving import Saver
from moe_train.train.step_control import StepControl
from moe_train.train.telemetry.load_alarms import Bounds, LoadAlarms
from moe_train.train.telemetry.recorder import FlopsReference, StepRecorder
from moe_train.train.telemetry.records import read_records
from moe_train.train.telemetry.writer import MetricsWriter
from moe_train.train.tracing import StepTracer


@dataclass(frozen=True)
class Setting:
    """What is known before ranks meet."""

    config: Config
    world: World
    device: torch.device
    folder: RunFolder
    data: PreparedData


def assemble(
    setting: Setting,
    point: ResumePoint,
    health: Health,
    signals: StopSignals,
    console: RunConsole,
    group: Group | None,
) -> tuple[Run, Progress]:
    """A run that is ready to train, and where it begins; `group` is for writing checkpoints. Collective: all ranks."""
    config, world, folder = setting.config, setting.world, setting.folder
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    assert micro != "auto" and batch is not None
    meter = None
    if config.telemetry.experts and config.model.moe_layer_indices:
        meter = TrafficMeter(setting.device)
    settings = deepspeed_config(config, world.world_size, config.train.precision)
    engine = make_engine(config, settings, setting.device, meter, health.flight_recorder)
    first = _restore(setting, point, engine, console, group)
    records, watch = _open_records(setting, first.step, console) if world.rank == 0 else (None, None)
    plan = BatchPlan(micro, batch, world.rank, world.world_size)
    recorder = StepRecorder(config, plan, console, meter, records, watch, _effort(setting))
    retention = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
    writer = CheckpointWriter(folder.checkpoints, world.rank, group, retention)
    step_control = StepControl(
        max_norm_ratio=config.train.max_grad_norm_ratio,
        max_skipped=config.train.max_skipped_steps,
        rank=world.rank,
        received=lambda: signals.received,
        save_is_done=lambda: writer.is_done,
        state=point.manifest.step_control if point.manifest is not None else None,
    )
    saver = Saver(config, engine, writer, step_control, plan, setting.data.tokenizer.fingerprint, console)
    layers = config.model.moe_layer_indices
    return Run(
        config=config,
        folder=folder,
        data=setting.data,
        engine=engine,
        plan=plan,
        device=setting.device,
        console=console,
        recorder=recorder,
        flight_recorder=health.flight_recorder,
        step_control=step_control,
        saver=saver,
        recovery=Recovery(
            engine, step_control, saver, recorder, console, plan, folder.checkpoints, layers, group, point.manifest
        ),
        watchdog=health.watchdog,
        tracer=StepTracer(
            folder.profile(world.rank), config.train.profile_steps, setting.device.type == "cuda", console.say
        ),
    ), first


def _restore(
    setting: Setting, point: ResumePoint, engine: TrainEngine, console: RunConsole, group: Group | None
) -> Progress:
    """The state of the checkpoint, if there is one, and where it was."""
    manifest, config = point.manifest, setting.config
    if manifest is None:
        return Progress()
    load_checkpoint(engine, manifest, group)
    for line in quarantine_damaged(point, setting.world.rank):
        console.say(line)
    left = config.train.steps - manifest.step
    console.say(f"going on from {manifest.folder}: {manifest.step} steps done, {left} to do")
    for change in changed_fields(manifest, config):
        console.say(f"  changed since: {change}")
    return Progress(manifest.step, manifest.consumed_sequences)


def _effort(setting: Setting) -> FlopsReference:
    """On all ranks at once: those of a CPU share its cores."""
    config, precision = setting.config, setting.config.train.precision
    assert precision != "auto" and config.model.vocab_size is not None
    flops = training_flops_per_token(config.model, config.model.vocab_size, config.train.sequence_length)
    return FlopsReference(flops, peak_flops(setting.device, precision))


def _open_records(setting: Setting, first_step: int, console: RunConsole) -> tuple[MetricsWriter, LoadAlarms | None]:
    config, folder, layers = setting.config, setting.folder, setting.config.model.moe_layer_indices
    save_config(folder, config)
    save_tokenizer(folder, setting.data.tokenizer)
    writer = MetricsWriter(folder.root, first_step, config.telemetry.tensorboard, console.say)
    # What is compared between runs; where a run is kept, and what is the default everywhere, is not.
    fields = [
        (name, value)
        for name, value in field_values(config.model_dump(mode="json"))
        if name.startswith(("model.", "optim.", "parallel.", "train."))
        and name != "train.run_dir"
        and value is not None
    ]
    writer.describe(layers if config.telemetry.experts else (), fields, f"```yaml\n{dump_yaml(config)}```")
    if not (config.telemetry.experts and layers):
        return writer, None
    bounds = Bounds.of(config.telemetry, config.model.moe)
    return writer, LoadAlarms(layers, bounds, read_records(folder.metrics))
