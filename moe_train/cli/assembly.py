"""Putting a run together for `moe-train train`: the model and its state, the records, and what keeps it alive.

It imports all that training needs, so that cli/train.py imports it only when the device is known.
"""

from moe_train.cli.train import Setting
from moe_train.config.base import field_values
from moe_train.config.deepspeed import deepspeed_config
from moe_train.config.load import dump_yaml
from moe_train.model.flops import training_flops_per_token
from moe_train.parallel.collectives import Group
from moe_train.parallel.peak import peak_flops
from moe_train.parallel.traffic import TrafficMeter
from moe_train.train.alarms import Bounds, ExpertWatch
from moe_train.train.assemble import make_engine
from moe_train.train.batches import BatchPlan
from moe_train.train.checkpoint.folders import Retention
from moe_train.train.checkpoint.reader import load_checkpoint
from moe_train.train.checkpoint.writer import CheckpointWriter
from moe_train.train.console import RunConsole
from moe_train.train.engine import TrainEngine
from moe_train.train.loop import Run
from moe_train.train.progress import Progress
from moe_train.train.recorder import Effort, StepRecorder
from moe_train.train.records import read_records
from moe_train.train.resilience.guard import StepGuard
from moe_train.train.resilience.lifelines import Lifelines
from moe_train.train.resilience.recovery import Recovery
from moe_train.train.resilience.signals import StopSignals
from moe_train.train.resume import Found, changed_fields, set_damaged_aside
from moe_train.train.run_folder import save_config, save_tokenizer
from moe_train.train.saving import Saver
from moe_train.train.telemetry import MetricsWriter
from moe_train.train.tracing import StepTracer


def assemble(
    setting: Setting,
    found: Found,
    lifelines: Lifelines,
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
    engine = make_engine(config, settings, setting.device, meter, lifelines.position)
    first = _restore(setting, found, engine, console, group)
    records, watch = _open_records(setting, first.step, console) if world.rank == 0 else (None, None)
    plan = BatchPlan(micro, batch, world.rank, world.world_size)
    recorder = StepRecorder(config, plan, console, meter, records, watch, _effort(setting))
    retention = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
    writer = CheckpointWriter(folder.checkpoints, world.rank, group, retention)
    guard = StepGuard(
        max_norm_ratio=config.train.max_grad_norm_ratio,
        max_skipped=config.train.max_skipped_steps,
        rank=world.rank,
        received=lambda: signals.received,
        save_is_done=lambda: writer.is_done,
        state=found.manifest.guard if found.manifest is not None else None,
    )
    saver = Saver(config, engine, writer, guard, plan, setting.data.tokenizer.fingerprint, console)
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
        position=lifelines.position,
        guard=guard,
        saver=saver,
        recovery=Recovery(
            engine, guard, saver, recorder, console, plan, folder.checkpoints, layers, group, found.manifest
        ),
        watchdog=lifelines.watchdog,
        tracer=StepTracer(
            folder.profile(world.rank), config.train.profile_steps, setting.device.type == "cuda", console.say
        ),
    ), first


def _restore(setting: Setting, found: Found, engine: TrainEngine, console: RunConsole, group: Group | None) -> Progress:
    """The state of the checkpoint, if there is one, and where it was."""
    manifest, config = found.manifest, setting.config
    if manifest is None:
        return Progress()
    load_checkpoint(engine, manifest, group)
    for line in set_damaged_aside(found, setting.world.rank):
        console.say(line)
    left = config.train.steps - manifest.step
    console.say(f"going on from {manifest.folder}: {manifest.step} steps done, {left} to do")
    for change in changed_fields(manifest, config):
        console.say(f"  changed since: {change}")
    return Progress(manifest.step, manifest.consumed_sequences)


def _effort(setting: Setting) -> Effort:
    """On all ranks at once: those of a CPU share its cores."""
    config, precision = setting.config, setting.config.train.precision
    assert precision != "auto" and config.model.vocab_size is not None
    flops = training_flops_per_token(config.model, config.model.vocab_size, config.train.sequence_length)
    return Effort(flops, peak_flops(setting.device, precision))


def _open_records(setting: Setting, first_step: int, console: RunConsole) -> tuple[MetricsWriter, ExpertWatch | None]:
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
    return writer, ExpertWatch(layers, bounds, read_records(folder.metrics))
