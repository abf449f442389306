"""Preparation of a run on one rank, before ranks communicate.

All that can be wrong is checked here, so that every rank finds the same error and no rank waits for another. The module
must not import DeepSpeed, which looks for a device as soon as it is imported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_train.config.context import sequence_readers
from moe_train.config.errors import UsageError
from moe_train.config.parts import load_kinds
from moe_train.config.paths import local_path
from moe_train.config.resolve import ResolvedConfig, resolve, resolve_sizes
from moe_train.config.root import Config
from moe_train.data import PreparedData, check_data, prepare_data
from moe_train.distributed.addresses import choose_interface
from moe_train.distributed.bootstrap import choose_device, environment, export_world, set_threads
from moe_train.distributed.world import World
from moe_train.host.gpus import bind_near_gpu
from moe_train.host.memory import keep_freed_memory
from moe_train.host.precision import describe_device
from moe_train.train.engine.settings import check_sizes
from moe_train.train.resume import saved_global_batch
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
    if config.moved_run:
        raise UsageError(config.moved_run)
    check_data(config.data)
    config = _with_saved_batch(config, world.world_size)
    device = choose_device(config.parallel.device, world)
    choose_interface(config.parallel.network_interface, environment())
    export_world(world, device)  # before DeepSpeed is imported
    kinds, described = load_kinds(config), describe_device(device)
    sizes = resolve_sizes(config, world, described, kinds)
    check_sizes(config, sizes, world.world_size)
    check_room(resolve(config, world, described, config.model.vocab_size or 1, kinds), world, device)
    folder = open_run_folder(config.train.run_dir)
    set_threads(config.parallel.threads_per_rank, world)
    bind_near_gpu(device)
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


def _with_saved_batch(config: Config, world_size: int) -> Config:
    """Take the checkpoint's global batch if none is given, so that a run keeps it on any number of ranks.

    The micro batch, if it is not given either, becomes the largest that divides a rank's share of it.

    Raises:
        UsageError: If the ranks, or the given micro batch, do not divide the checkpoint's global batch.
    """
    train = config.train
    if train.global_batch_size is not None:
        return config
    checkpoints = RunFolder(local_path(train.run_dir, "train.run_dir")).checkpoints
    saved = saved_global_batch(config.checkpoint.resume, checkpoints)
    if saved is None:
        return config
    size, folder = saved
    is_given = "micro_batch_size" in train.model_fields_set and train.micro_batch_size != "auto"
    micro = int(train.micro_batch_size) if is_given else 1
    readers, note = sequence_readers(config, world_size)
    if size % (micro * readers):
        sizes = f"train.micro_batch_size x ranks ({micro} x {readers} = {micro * readers})"
        largest = max((each for each in range(1, micro + 1) if size % (each * readers) == 0), default=None)
        first = f"give --train.micro_batch_size={largest}" if largest else f"take ranks that divide {size}"
        multiple = math.ceil(size / (micro * readers)) * micro * readers
        raise UsageError(
            f"the global batch of {size} sequences, which comes from {folder} because no train.global_batch_size is "
            f"given, must be divisible by {sizes if is_given else f'the ranks ({readers})'}{note}: {first}, or change "
            f"the steps that follow by --train.global_batch_size={multiple}"
        )
    changes = {"global_batch_size": size} | ({} if is_given else {"micro_batch_size": "auto"})
    return config.model_copy(update={"train": train.model_copy(update=changes)})
