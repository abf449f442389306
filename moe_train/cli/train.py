"""`moe-train train` and launch/train.py: from the command line to a trained model.

What can be wrong is checked first, before torch is imported and before ranks meet: every rank finds the same error.
"""

import contextlib
import faulthandler
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moe_train.config.base import field_values
from moe_train.config.errors import EXIT_STOPPED, UsageError
from moe_train.config.load import load_config
from moe_train.config.root import Config, check_payload, check_world
from moe_train.data import PreparedData, check_data, prepare_data
from moe_train.distributed.addresses import choose_interface
from moe_train.distributed.bootstrap import (
    choose_device,
    discover_world,
    environment,
    export_world,
    init_process_group,
    set_threads,
)
from moe_train.distributed.world import World, check_nodes
from moe_train.host.memory import keep_freed_memory
from moe_train.host.versions import versions
from moe_train.train.engine.settings import check_additions, deepspeed_config

if TYPE_CHECKING:
    from moe_train.checkpoint.resume_point import ResumePoint
    from moe_train.cli.assembly import Setting
    from moe_train.distributed.collectives import Group
    from moe_train.liveness.health import Health
    from moe_train.train.console import RunConsole
    from moe_train.train.loop import Run, TrainResult

DESCRIPTION = "Train a Mixture-of-Experts language model. Dotted options override the fields of the YAML file."


def run(arguments: Sequence[str], program: str = "moe-train train") -> int:
    """Train; the exit code. Collective: all ranks of the world."""
    config = load_config(arguments, program=program, description=DESCRIPTION)
    world = discover_world()
    config = check_world(_with_saved_batch(config), world.world_size, world.local_world_size)
    check_additions(config)
    check_data(config.data)
    setting = _prepare(config, world)
    output, errors = _redirect(setting)
    try:
        code = _train(setting, output, errors)
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


def _with_saved_batch(config: Config) -> Config:
    """Where no global batch is given, that of the checkpoint: the run goes on with it on any number of ranks."""
    checkpoints = Path(config.train.run_dir) / "checkpoints"
    is_resumable = checkpoints.is_dir() or Path(config.checkpoint.resume).is_dir()
    if config.train.global_batch_size is not None or not is_resumable:
        return config
    from moe_train.train.resume import saved_global_batch_size

    saved = saved_global_batch_size(config.checkpoint.resume, checkpoints)
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": saved})})


def _prepare(config: Config, world: World) -> "Setting":
    from moe_train.host.precision import resolve_precision
    from moe_train.train.run_folder import open_run_folder

    folder = open_run_folder(config.train.run_dir)
    device = choose_device(config.parallel.device, world)
    choose_interface(config.parallel.network_interface, environment())
    export_world(world, device)  # before DeepSpeed is imported, which looks for a device at once
    precision = resolve_precision(config.train.precision, device)
    check_payload(config.parallel, precision)
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
    from moe_train.cli.assembly import Setting  # brings all that training needs

    return Setting(_resolve_vocabulary(config, data), world, device, folder, data)


def _resolve_vocabulary(config: Config, data: PreparedData) -> Config:
    needed, given = data.tokenizer.vocab_size, config.model.vocab_size
    if given is not None and given < needed:
        raise UsageError(f"model.vocab_size ({given}) is smaller than the tokenizer's vocabulary ({needed})")
    model = config.model.model_copy(update={"vocab_size": given if given is not None else needed})
    return config.model_copy(update={"model": model})


def _redirect(setting: "Setting") -> tuple[TextIO, TextIO]:
    from moe_train.train.run_folder import redirect_output

    output, errors = redirect_output(setting.folder.log(setting.world.rank))
    faulthandler.enable(errors)
    return output, errors


def _train(setting: "Setting", output: TextIO, errors: TextIO) -> int:
    from moe_train.distributed.consensus import run_on_all_ranks
    from moe_train.liveness.health import connect
    from moe_train.model.compiled import check_compiler
    from moe_train.train.console import RunConsole

    config, world = setting.config, setting.world
    console = RunConsole(output if world.rank == 0 else None)
    layout = f"{world.world_size} x {setting.device.type} ({world.launcher}), {config.train.precision}"
    layout += f", expert parallel {config.parallel.expert_parallel_size}, ZeRO {config.parallel.zero_stage}"
    console.say(f"moe_train: {layout}; run folder {config.train.run_dir}")
    init_process_group(world, setting.device, config.parallel.timeout_seconds)
    if config.train.compile:
        run_on_all_ranks(lambda: check_compiler(setting.device))
    health = connect(
        world.master_addr,
        world.rank,
        world.world_size,
        step_timeout_seconds=config.train.step_timeout_seconds,
        peer_timeout_seconds=config.parallel.peer_timeout_seconds,
        streams=(sys.stderr, errors),
    )
    try:
        code = _train_watched(setting, health, console, errors)
    except UsageError as error:
        health.peers.fail(str(error))  # mostly all find the same, but none must wait for one that has left
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):
            traceback.print_exc()  # to the log, before others are asked
        reason, code = health.explain(error)
        with contextlib.suppress(OSError):
            print(f"rank {world.rank}: {reason}; its log is {setting.folder.log(world.rank)}", file=errors)
        return code
    health.leave()
    return code


def _train_watched(setting: "Setting", health: "Health", console: "RunConsole", errors: TextIO) -> int:
    from moe_train.cli.assembly import assemble
    from moe_train.distributed.collectives import barrier
    from moe_train.distributed.mesh import create_background_group
    from moe_train.liveness.signals import StopSignals
    from moe_train.train.loop import train

    rank = setting.world.rank

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(f"rank {rank}: {text}", file=errors, flush=True)

    with StopSignals(say) as signals:
        group = create_background_group()
        point = _agree(setting, group)
        training, first = assemble(setting, point, health, signals, console, group)
        result = train(training, first)
        if result.stopped is not None:
            signals.ignore()
    if result.stopped is not None:
        console.say(f"stopped by {result.stopped}; saved in {result.checkpoint}: the same command goes on from there")
    else:
        _conclude(training, result)
    training.recorder.close()
    barrier()  # no rank leaves while another still needs its experts or its store
    return EXIT_STOPPED if result.stopped is not None else 0


def _conclude(training: "Run", result: "TrainResult") -> None:
    """The closing summary, on rank 0; all ranks sample its text together."""
    sample = _sample(training)
    if training.plan.rank == 0:
        from moe_train.model.count import count_parameters
        from moe_train.train.summary import make_summary, show_summary, write_summary

        model = training.config.model
        summary = make_summary(training, result, count_parameters(model, model.vocab_size or 0), sample)
        try:
            write_summary(training.folder.summary, summary)
        except OSError as error:  # all that was trained is saved
            training.console.say(f"warning: {training.folder.summary} could not be written: {error}")
        show_summary(training, summary)


def _agree(setting: "Setting", group: "Group | None") -> "ResumePoint":
    """The checkpoint to go on from; everything that each rank found out for itself must be the same on all."""
    from moe_train.checkpoint.folders import remove_leftovers
    from moe_train.checkpoint.resume_point import find_resume_point
    from moe_train.distributed.consensus import run_on_all_ranks
    from moe_train.train.resume import check_resumable
    from moe_train.train.telemetry.records import read_records

    config, data, world, folder = setting.config, setting.data, setting.world, setting.folder

    def tidy() -> None:
        check_nodes(config.parallel.node_size, world)
        if world.rank == 0:
            read_records(folder.metrics)  # a damaged one is said before the ranks begin
            remove_leftovers(folder.checkpoints)

    def describe(_: None) -> dict[str, str]:
        return {
            **versions(),
            **{name: str(value) for name, value in field_values(config.model_dump(mode="json"))},
            "the data": " ".join(folder.name for folder in data.cache_dirs),
        }

    run_on_all_ranks(tidy, describe)
    point = find_resume_point(config.checkpoint.resume, folder.checkpoints, world.rank, world.world_size, group)
    if point.manifest is not None:
        check_resumable(point.manifest, config, data.tokenizer.fingerprint)
    return point


def _sample(training: "Run") -> str | None:
    from moe_train.infer.decode import DecodePlan, Decoder
    from moe_train.infer.sampling import Sampling

    config, tokenizer = training.config, training.data.tokenizer
    if config.train.sample_tokens == 0:
        return None
    sampling = Sampling(temperature=0.7, seed=config.train.seed)
    mark = tokenizer.end_of_document if config.model.isolate_documents else None
    plan = DecodePlan(config.train.sample_tokens, tokenizer.vocab_size, sampling, end_of_document=mark)
    steps = Decoder(training.engine.model, [[tokenizer.end_of_document]], plan)
    ids = [int(chosen_B) for chosen_B in steps]
    return tokenizer.decode([i for i in ids if i != tokenizer.end_of_document])
