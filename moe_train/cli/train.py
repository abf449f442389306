"""`moe-train train` and launch/train.py: from the command line to a trained model.

What can be wrong is checked first, before torch is imported and before ranks meet: every rank finds the same error.
"""

import faulthandler
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from moe_train.config.deepspeed import check_additions, deepspeed_config
from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml, load_config
from moe_train.config.root import Config, check_world
from moe_train.data import PreparedData, check_data, prepare_data
from moe_train.parallel.bootstrap import (
    choose_device,
    destroy_process_group,
    export_world,
    init_process_group,
    set_threads,
)
from moe_train.parallel.bootstrap import discover_world as discover
from moe_train.parallel.host_memory import keep_freed_memory
from moe_train.parallel.world import World

if TYPE_CHECKING:
    import torch

    from moe_train.train.console import RunConsole
    from moe_train.train.loop import Run
    from moe_train.train.run_folder import RunFolder

DESCRIPTION = (
    "Train a Mixture-of-Experts language model. Fields are set in a YAML file and overridden by dotted options."
)


def run(arguments: Sequence[str]) -> int:
    """Train; the exit code. Collective: all ranks of the world."""
    config = load_config(arguments, program="train.py", description=DESCRIPTION)
    world = discover()
    config = check_world(config, world.world_size, world.local_world_size)
    check_additions(config)
    check_data(config.data)
    from moe_train.train.run_folder import open_run_folder, redirect_output

    folder = open_run_folder(config.train.run_dir)
    device = choose_device(config.parallel.device, world)
    config = _resolve_precision(config, device)
    set_threads(config.parallel.threads_per_rank, world)
    if device.type == "cpu":
        keep_freed_memory()
    data = _prepare_data(config, world)
    config = _resolve_vocabulary(config, data)
    output, errors = redirect_output(folder.log(world.rank))
    faulthandler.enable(errors)
    try:
        return _train(config, world, folder, device, data, output)
    except UsageError:
        sys.stderr = errors  # where the message belongs
        raise
    except BaseException:
        print(f"rank {world.rank} failed; its log is {folder.log(world.rank)}", file=errors)
        traceback.print_exc(file=errors)
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        destroy_process_group()


def _prepare_data(config: Config, world: World) -> PreparedData:
    assert config.train.global_batch_size is not None
    return prepare_data(
        config.data,
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
        min_sequences=config.train.global_batch_size,
        local_rank=world.local_rank,
        show_progress=world.local_rank == 0,
    )


def _resolve_precision(config: Config, device: "torch.device") -> Config:
    from moe_train.parallel.precision import resolve_precision

    precision = resolve_precision(config.train.precision, device)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def _resolve_vocabulary(config: Config, data: PreparedData) -> Config:
    needed, given = data.tokenizer.vocab_size, config.model.vocab_size
    if given is not None and given < needed:
        raise UsageError(f"model.vocab_size ({given}) is smaller than the tokenizer's vocabulary ({needed})")
    model = config.model.model_copy(update={"vocab_size": given if given is not None else needed})
    return config.model_copy(update={"model": model})


def _train(
    config: Config, world: World, folder: "RunFolder", device: "torch.device", data: PreparedData, output: TextIO
) -> int:
    from moe_train.model.count import count_parameters
    from moe_train.train.console import RunConsole
    from moe_train.train.loop import train
    from moe_train.train.resume import find_checkpoint, resume
    from moe_train.train.run_folder import save_config
    from moe_train.train.summary import make_summary, show_summary, write_summary

    console = RunConsole(output if world.rank == 0 else None)
    console.say(_describe(config, world, device))
    manifest = find_checkpoint(config, folder)
    export_world(world, device)
    init_process_group(world, device, config.parallel.timeout_seconds)
    first_step = manifest.step if manifest is not None else 0
    training = _assemble(config, world, folder, device, data, console, first_step)
    if manifest is not None:
        resume(training, manifest)
    if training.writer is not None:
        save_config(folder, config)
        training.writer.write_text("config", f"```yaml\n{dump_yaml(config)}```")
    result = train(training, first_step)
    sample = _sample(training)
    if training.writer is not None:
        parameters = count_parameters(config.model, config.model.vocab_size or 0)
        summary = make_summary(training, result, parameters, sample)
        write_summary(folder.summary, summary)
        show_summary(training, summary)
        training.writer.close()
    return 0


def _assemble(
    config: Config,
    world: World,
    folder: "RunFolder",
    device: "torch.device",
    data: PreparedData,
    console: "RunConsole",
    first_step: int,
) -> "Run":
    from moe_train.train.assemble import assemble_run

    settings = deepspeed_config(config, world.world_size, config.train.precision)
    return assemble_run(config, world.rank, world.world_size, folder, device, data, console, first_step, settings)


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


def _describe(config: Config, world: World, device: "torch.device") -> str:
    layout = f"{world.world_size} x {device.type} ({world.launcher}), {config.train.precision}"
    layout += f", expert parallel {config.parallel.expert_parallel_size}, ZeRO {config.parallel.zero_stage}"
    return f"moe_train: {layout}; run folder {config.train.run_dir}"
