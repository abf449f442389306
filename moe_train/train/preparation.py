"""Preparation of a run on one rank, before ranks communicate.

All that can be wrong is checked here, so that every rank finds the same error and no rank waits for another. The module
must not import DeepSpeed, which looks for a device as soon as it is imported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.config.parts import load_kinds
from moe_train.config.resolve import ResolvedConfig, resolve, resolve_sizes
from moe_train.config.root import Config
from moe_train.data import PreparedData, check_data, prepare_data
from moe_train.distributed.addresses import choose_interface
from moe_train.distributed.bootstrap import choose_device, environment, export_world, set_threads
from moe_train.distributed.world import World
from moe_train.host.memory import keep_freed_memory
from moe_train.host.precision import describe_device
from moe_train.train.engine.settings import check_sizes
from moe_train.train.resume import saved_global_batch_size
from moe_train.train.run_folder import RunFolder, open_run_folder


@dataclass(frozen=True)
class PreparedRun:
    """A run prepared on one rank, before ranks communicate.

    Attributes:
        config: Resolved configuration.
        world: Place of this process among the ranks.
        device: Device of this rank.
        folder: Folder of the run.
        data: Training and held-out sequences, and their tokenizer.
    """

    config: ResolvedConfig
    world: World
    device: torch.device
    folder: RunFolder
    data: PreparedData


RoomCheck = Callable[[ResolvedConfig, World, torch.device], None]
"""Check that the model fits on the ranks; it raises UsageError. It is in moe_train.plan, which knows the states."""


def prepare_run(config: Config, world: World, check_room: RoomCheck) -> PreparedRun:
    """Check a configuration, choose the device, prepare the data and resolve every size.

    Args:
        config: Configuration as loaded.
        world: Place of this process among the ranks.
        check_room: Check of the memory, made before the data is read.

    Raises:
        UsageError: If the run cannot work.
    """
    check_data(config.data)
    config = _with_saved_batch(config)
    device = choose_device(config.parallel.device, world)
    choose_interface(config.parallel.network_interface, environment())
    export_world(world, device)  # before DeepSpeed is imported
    kinds, described = load_kinds(config), describe_device(device)
    sizes = resolve_sizes(config, world, described, kinds)
    check_sizes(config, sizes, world.world_size)
    check_room(resolve(config, world, described, config.model.vocab_size or 1, kinds), world, device)
    folder = open_run_folder(config.train.run_dir)
    set_threads(config.parallel.threads_per_rank, world)
    if device.type == "cpu":
        keep_freed_memory()
    data = prepare_data(
        config.data,
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
        min_sequences=sizes.global_batch_size,
        local_rank=world.local_rank,
        show_progress=world.local_rank == 0,
    )
    resolved = resolve(config, world, described, data.tokenizer.vocab_size, kinds)
    return PreparedRun(resolved, world, device, folder, data)


def _with_saved_batch(config: Config) -> Config:
    """Take the checkpoint's global batch if none is given, so that a run keeps it on any number of ranks."""
    checkpoints = Path(config.train.run_dir) / "checkpoints"
    is_resumable = checkpoints.is_dir() or Path(config.checkpoint.resume).is_dir()
    if config.train.global_batch_size is not None or not is_resumable:
        return config
    saved = saved_global_batch_size(config.checkpoint.resume, checkpoints)
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": saved})})
