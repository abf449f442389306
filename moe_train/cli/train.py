"""`moe-train train` and launch/train.py: from the command line to a trained model.

What can be wrong is checked first, before torch is imported and before ranks meet: every rank finds the same error.
"""

import contextlib
import faulthandler
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from moe_train.config.deepspeed import check_additions, deepspeed_config
from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml, load_config
from moe_train.config.root import Config, check_world
from moe_train.data import PreparedData, check_data, prepare_data
from moe_train.parallel.bootstrap import (
    choose_device,
    discover_world,
    export_world,
    init_process_group,
    set_threads,
)
from moe_train.parallel.host_memory import keep_freed_memory
from moe_train.parallel.world import World

if TYPE_CHECKING:
    import torch

    from moe_train.train.alarms import ExpertWatch
    from moe_train.train.console import RunConsole
    from moe_train.train.loop import Run
    from moe_train.train.manifest import Manifest
    from moe_train.train.run_folder import RunFolder
    from moe_train.train.telemetry import MetricsWriter

DESCRIPTION = "Train a Mixture-of-Experts language model. Dotted options override the fields of the YAML file."


@dataclass(frozen=True)
class _Setting:
    """What is known before ranks meet."""

    config: Config
    world: World
    device: "torch.device"
    folder: "RunFolder"
    data: PreparedData


def run(arguments: Sequence[str], program: str = "moe-train train") -> int:
    """Train; the exit code. Collective: all ranks of the world."""
    config = load_config(arguments, program=program, description=DESCRIPTION)
    world = discover_world()
    config = check_world(config, world.world_size, world.local_world_size)
    check_additions(config)
    check_data(config.data)
    setting = _prepare(config, world)
    output, errors = _redirect(setting)
    try:
        code = _train(setting, output)
    except UsageError:
        sys.stderr = errors  # where the message belongs
        raise
    except BaseException:
        print(f"rank {world.rank} failed; its log is {setting.folder.log(world.rank)}", file=errors)
        traceback.print_exc(file=errors)
        traceback.print_exc()
        code = 1  # and out, without waiting for ranks that wait for this one
    with contextlib.suppress(OSError):  # a closed output ends no run
        output.flush()
    return code


def _prepare(config: Config, world: World) -> _Setting:
    from moe_train.parallel.precision import resolve_precision
    from moe_train.train.run_folder import open_run_folder

    folder = open_run_folder(config.train.run_dir)
    device = choose_device(config.parallel.device, world)
    export_world(world, device)  # before DeepSpeed is imported, which looks for a device at once
    precision = resolve_precision(config.train.precision, device)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    deepspeed_config(config, world.world_size, precision)  # refuses additions that contradict a field
    set_threads(config.parallel.threads_per_rank, world)
    if device.type == "cpu":
        keep_freed_memory()
    assert config.train.global_batch_size is not None
    data = prepare_data(
        config.data,
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
        min_sequences=config.train.global_batch_size,
        local_rank=world.local_rank,
        show_progress=world.local_rank == 0,
    )
    return _Setting(_resolve_vocabulary(config, data), world, device, folder, data)


def _resolve_vocabulary(config: Config, data: PreparedData) -> Config:
    needed, given = data.tokenizer.vocab_size, config.model.vocab_size
    if given is not None and given < needed:
        raise UsageError(f"model.vocab_size ({given}) is smaller than the tokenizer's vocabulary ({needed})")
    model = config.model.model_copy(update={"vocab_size": given if given is not None else needed})
    return config.model_copy(update={"model": model})


def _redirect(setting: _Setting) -> tuple[TextIO, TextIO]:
    from moe_train.train.run_folder import redirect_output

    output, errors = redirect_output(setting.folder.log(setting.world.rank))
    faulthandler.enable(errors)
    return output, errors


def _train(setting: _Setting, output: TextIO) -> int:
    from moe_train.parallel.collectives import barrier
    from moe_train.train.console import RunConsole
    from moe_train.train.loop import train

    config, world = setting.config, setting.world
    console = RunConsole(output if world.rank == 0 else None)
    layout = f"{world.world_size} x {setting.device.type} ({world.launcher}), {config.train.precision}"
    layout += f", expert parallel {config.parallel.expert_parallel_size}, ZeRO {config.parallel.zero_stage}"
    console.say(f"moe_train: {layout}; run folder {config.train.run_dir}")
    init_process_group(world, setting.device, config.parallel.timeout_seconds)
    manifest = _agree(setting)
    training = _assemble(setting, manifest, console)
    result = train(training, manifest.step if manifest is not None else 0)
    sample = _sample(training)
    if world.rank == 0:
        from moe_train.model.count import count_parameters
        from moe_train.train.summary import make_summary, show_summary, write_summary

        parameters = count_parameters(config.model, config.model.vocab_size or 0)
        summary = make_summary(training, result, parameters, sample)
        write_summary(setting.folder.summary, summary)
        show_summary(training, summary)
    training.recorder.close()
    barrier()  # no rank leaves while another still needs its experts or its store
    return 0


def _agree(setting: _Setting) -> "Manifest | None":
    """The checkpoint to go on from; everything that each rank found out for itself must be the same on all."""
    from moe_train.train.agreement import together
    from moe_train.train.records import read_records
    from moe_train.train.resume import check_resumable, field_values, find_checkpoint

    config, data = setting.config, setting.data

    def find() -> "Manifest | None":
        if setting.world.rank == 0:
            read_records(setting.folder.metrics)  # a damaged one is said before the ranks begin
        manifest = find_checkpoint(config, setting.folder)
        if manifest is not None:
            check_resumable(manifest, config, data.tokenizer.fingerprint)
        return manifest

    def describe(manifest: "Manifest | None") -> dict[str, str]:
        return {
            **{name: str(value) for name, value in field_values(config.model_dump(mode="json"))},
            "the data": " ".join(folder.name for folder in data.cache_dirs),
            "the checkpoint to go on from": str(manifest.step) if manifest is not None else "none",
        }

    return together(find, describe)


def _assemble(setting: _Setting, manifest: "Manifest | None", console: "RunConsole") -> "Run":
    from moe_train.parallel.traffic import TrafficMeter
    from moe_train.train.assemble import make_engine
    from moe_train.train.batches import BatchPlan
    from moe_train.train.checkpoint import load_checkpoint
    from moe_train.train.loop import Run
    from moe_train.train.recorder import StepRecorder
    from moe_train.train.resume import changed_fields

    config, world, folder = setting.config, setting.world, setting.folder
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    assert micro != "auto" and batch is not None
    settings = deepspeed_config(config, world.world_size, config.train.precision)
    meter = None
    if config.telemetry.experts and config.model.moe_layer_indices:
        meter = TrafficMeter(setting.device)
    engine = make_engine(config, settings, setting.device, meter)
    first_step = 0
    if manifest is not None:
        load_checkpoint(engine, manifest, world.rank, world.world_size)
        first_step = manifest.step
        left = config.train.steps - first_step
        console.say(f"going on from {manifest.folder}: {first_step} steps done, {left} to do")
        for change in changed_fields(manifest, config):
            console.say(f"  changed since: {change}")
    writer, watch = _open_records(setting, first_step) if world.rank == 0 else (None, None)
    plan = BatchPlan(micro, batch, world.rank, world.world_size)
    recorder = StepRecorder(config, plan, console, meter, writer, watch)
    return Run(config, folder, setting.data, engine, plan, setting.device, console, recorder)


def _open_records(setting: _Setting, first_step: int) -> "tuple[MetricsWriter, ExpertWatch | None]":
    from moe_train.train.alarms import Bounds, ExpertWatch
    from moe_train.train.records import read_records
    from moe_train.train.resume import field_values
    from moe_train.train.run_folder import save_config
    from moe_train.train.telemetry import MetricsWriter

    config, folder, layers = setting.config, setting.folder, setting.config.model.moe_layer_indices
    save_config(folder, config)
    writer = MetricsWriter(folder.root, first_step, config.telemetry.tensorboard)
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


def _sample(training: "Run") -> str | None:
    from moe_train.infer.generate import generate

    config, tokenizer = training.config, training.data.tokenizer
    if config.train.sample_tokens == 0:
        return None
    ids = generate(
        training.engine.model,
        [tokenizer.end_of_document],
        config.train.sample_tokens,
        temperature=0.7,
        seed=config.train.seed,
        vocab_size=tokenizer.vocab_size,
    )
    return tokenizer.decode([i for i in ids if i != tokenizer.end_of_document])
