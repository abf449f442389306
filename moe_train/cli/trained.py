"""A trained model for a command that uses it: from `--run` to the weights on this rank, in whatever layout it runs.

What can be wrong is found before ranks meet, the same on each of them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.base import merge
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config, validate_config
from moe_train.config.root import Config, check_world
from moe_train.data import ByteTokenizer, Tokenizer, find_tokenizer, load_tokenizer_file
from moe_train.distributed.bootstrap import (
    choose_device,
    discover_world,
    export_world,
    init_process_group,
    set_threads,
)
from moe_train.distributed.world import World
from moe_train.host.memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

    from moe_train.checkpoint.manifest import Manifest
    from moe_train.model.transformer import Transformer

_NAMING = ("source", "mixture", "paths", "name", "subset")  # fields that name other data than the run's
_TOKENIZER = ("tokenizer", "bpe_vocab_size", "end_of_document")


@dataclass(frozen=True)
class Trained:
    """A checkpoint and how this rank is to use it.

    Attributes:
        manifest: Of the checkpoint.
        config: Of the run that made it, with what the command line changes and the layout of now.
        tokenizer: The one it was trained with.
        world: Place of this rank.
        device: Of this rank.
        dtype: Of the weights.
    """

    manifest: "Manifest"
    config: Config
    tokenizer: Tokenizer
    world: World
    device: "torch.device"
    dtype: "torch.dtype"


def add_run_option(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint: for `find_checkpoint_folder(options.run, "--run")`."""
    # torchrun takes --run for one of its own options, wherever it stands; it leaves --run-dir alone.
    help_text = "a run's folder (its newest checkpoint), or a checkpoint's"
    parser.add_argument("--run", "--run-dir", dest="run", required=True, metavar="DIR", help=help_text)


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuse what is below 1 of the options that are given.

    Raises:
        UsageError: Naming the option and its value.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} ({value}) must be 1 or more")


def add_trained_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that uses a trained model."""
    add_run_option(parser)
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it is")
    help_text = "of the model; auto: as it was trained, fp32 where the device lacks that"
    group.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help=help_text)
    help_text = (
        "ranks that share the experts, under a launcher (default: as many as divide experts and ranks of a host)"
    )
    group.add_argument("--expert-parallel-size", type=int, metavar="N", help=help_text)
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of a rank (default: a host's share)")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it


def open_trained(
    options: argparse.Namespace,
    program: str,
    changes: dict[str, Any] | None = None,
    data_options: Sequence[str] = (),
) -> Trained:
    """Find the checkpoint, its configuration and tokenizer.

    Args:
        options: Of a parser with `add_trained_options`.
        program: For messages.
        changes: Fields of the configuration that other options of the command set.
        data_options: Dotted options of the data section.

    Raises:
        UsageError: If there is none, or it is not of this model or tokenizer.
    """
    from moe_train.checkpoint.inventory import find_checkpoint_folder
    from moe_train.checkpoint.manifest import read_manifest
    from moe_train.host.precision import torch_dtype

    check_positive(options, "expert_parallel_size", "threads")
    manifest = read_manifest(find_checkpoint_folder(options.run, "--run"))
    world = discover_world()
    config = _configuration(manifest, options, program, changes or {}, data_options)
    config = check_world(config, world.world_size, world.local_world_size)
    device = choose_device(config.parallel.device, world)
    export_world(world, device)
    set_threads(config.parallel.threads_per_rank, world)
    if device.type == "cpu":
        keep_freed_memory()
    precision = _precision(options.precision, config.train.precision, device)
    tokenizer = _tokenizer_of(manifest, config, world)
    return Trained(manifest, config, tokenizer, world, device, torch_dtype(precision))


def load_model(trained: Trained) -> "Transformer":
    """The model with its weights on this rank, every byte of which is verified first. Collective: all ranks."""
    from moe_train.checkpoint.files import verify_files
    from moe_train.distributed.consensus import run_on_all_ranks
    from moe_train.distributed.mesh import create_mesh
    from moe_train.infer.loading import check_fits, load_weights
    from moe_train.model.build import ExpertPlacement, build_model

    config, world, manifest = trained.config, trained.world, trained.manifest
    size, placement = config.parallel.expert_parallel_size, ExpertPlacement()
    assert isinstance(size, int) and config.model.vocab_size is not None
    if world.world_size > 1:
        init_process_group(world, trained.device, config.parallel.timeout_seconds)
        # In one hop and one chunk: a few tokens are a matter of latency. What travels is what it was in training.
        mesh = create_mesh(size, config.parallel.timeout_seconds)
        placement = ExpertPlacement(
            mesh.expert.rank, size, mesh.dispatch_groups, config.parallel.dispatch, payload=config.parallel.payload
        )
    model = build_model(config.model, config.model.vocab_size, seed=config.train.seed, placement=placement)
    check_fits(model, manifest)
    run_on_all_ranks(
        lambda: verify_files(manifest, sorted(manifest.files)[world.rank :: world.world_size]),
        lambda _: {"the checkpoint": f"{manifest.folder.name} of {manifest.step} steps"},
    )
    run_on_all_ranks(lambda: load_weights(model, manifest, dtype=trained.dtype, device=trained.device))
    return model.eval()


def _configuration(
    manifest: "Manifest",
    options: argparse.Namespace,
    program: str,
    changes: dict[str, Any],
    data_options: Sequence[str],
) -> Config:
    # How it was trained is not how it is used: ranks, batch and steps are those of now.
    layout: dict[str, Any] = {"parallel": {"expert_parallel_size": "auto", "device": options.device}}
    layout["parallel"] |= {"threads_per_rank": options.threads or "auto", "ranks_per_node": "auto"}
    layout["train"] = {"micro_batch_size": 1, "global_batch_size": None}
    if options.expert_parallel_size is not None:
        layout["parallel"]["expert_parallel_size"] = options.expert_parallel_size
    values = merge(merge(manifest.config, layout), changes)
    origin = str(manifest.folder)
    if not data_options:
        return validate_config(values, origin=origin)
    given = data_fields(data_options)
    if tokenizer := given & set(_TOKENIZER):
        raise UsageError(f"--data.{min(tokenizer)}: the tokenizer is the one that the model was trained with")
    if names_other_data(given):
        data = manifest.config.get("data", {})
        kept = (*_TOKENIZER, "cache_dir", *(() if given & {"source", "mixture"} else ("source", "text_column")))
        values["data"] = {name: data[name] for name in kept if name in data}
    return load_config(data_options, program=program, defaults=values)


def data_fields(data_options: Sequence[str]) -> set[str]:
    """The fields of data that dotted options set.

    Args:
        data_options: As on the command line: "--data.x=y", or "--data.x" and "y".

    Raises:
        UsageError: If there is an option of another section.
    """
    names = {option.partition("=")[0] for option in data_options if option.startswith("--")}
    for name in names:
        if not name.startswith("--data."):
            raise UsageError(f"unknown option {name}; --help lists the options, and fields of data begin with --data.")
    return {name.removeprefix("--data.") for name in names}


def names_other_data(fields: set[str]) -> bool:
    """Whether fields of data that are set name other data than the run's."""
    return bool(fields & set(_NAMING))


def _precision(setting: str, trained: str, device: "torch.device") -> Any:
    from moe_train.host.precision import resolve_precision

    if setting == "fp16" and device.type == "cpu":
        raise UsageError("--precision (fp16) needs --device cuda: on a CPU it is bf16 or fp32")
    if setting != "auto":
        return resolve_precision(setting, device)  # type: ignore[arg-type]  # argparse has checked it
    if trained == "fp16" and device.type == "cuda":
        return "fp16"
    return "fp32" if trained == "fp32" else resolve_precision("auto", device)


def _tokenizer_of(manifest: "Manifest", config: Config, world: World) -> Tokenizer:
    if manifest.tokenizer == ByteTokenizer().fingerprint:
        return ByteTokenizer()
    saved = Path(manifest.folder).resolve().parent.parent / "tokenizer.json"
    mark = config.data.end_of_document
    if saved.is_file():
        tokenizer: Tokenizer = load_tokenizer_file(saved, mark, "tokenizer")
        where = str(saved)
    else:  # of a run before tokenizers were saved with it
        tokenizer, where = find_tokenizer(config.data, local_rank=world.local_rank), "data.tokenizer"
    if tokenizer.fingerprint != manifest.tokenizer:
        raise UsageError(
            f"{where} is another tokenizer than {manifest.folder} was trained with: the same numbers would mean other "
            "text; put the run's tokenizer.json back"
        )
    return tokenizer
