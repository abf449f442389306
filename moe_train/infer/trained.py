"""Opening of a trained model: from a run's folder to the weights on this rank, in any layout of ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_train.checkpoint.files import verify_files
from moe_train.checkpoint.inventory import find_checkpoint_folder
from moe_train.checkpoint.manifest import Manifest, read_manifest
from moe_train.config.base import merge
from moe_train.config.errors import UsageError
from moe_train.config.load import validate_config
from moe_train.config.parts import load_kinds
from moe_train.config.resolve import Precision, ResolvedConfig, resolve
from moe_train.config.root import Config
from moe_train.data import ByteTokenizer, Tokenizer, find_tokenizer, load_tokenizer_file
from moe_train.distributed.bootstrap import choose_device, export_world, init_process_group, set_threads
from moe_train.distributed.consensus import run_on_all_ranks
from moe_train.distributed.context import ContextRanks
from moe_train.distributed.kernel_agreement import agree_on_kernels
from moe_train.distributed.mesh import create_context_group, create_mesh
from moe_train.distributed.missing_ranks import say_error
from moe_train.distributed.world import World
from moe_train.host.memory import keep_freed_memory
from moe_train.host.precision import describe_device, resolve_precision, torch_dtype
from moe_train.infer.loading import check_fits, load_weights
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.transformer import Transformer


@dataclass(frozen=True)
class Use:
    """Settings for the use of a trained model; those of its training do not matter.

    Attributes:
        device: Device; auto: cuda if there is one.
        precision: Precision of weights and activations; auto: that of training, or fp32 if the device lacks it.
        expert_parallel_size: Ranks that share the experts; None: as many as divide experts and ranks of a host.
        threads: CPU threads of a rank; None: its share of the host's.
        context_parallel_size: Ranks that share the tokens of a sequence, in evaluation.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    expert_parallel_size: int | None = None
    threads: int | None = None
    context_parallel_size: int = 1


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and what this rank needs to use it.

    Attributes:
        manifest: Manifest of the checkpoint.
        config: Configuration of the training, with the sizes of this use.
        tokenizer: Tokenizer that the model was trained with.
        world: Place of this process among the ranks.
        device: Device of this rank.
        dtype: dtype of the weights.
    """

    manifest: Manifest
    config: ResolvedConfig
    tokenizer: Tokenizer
    world: World
    device: torch.device
    dtype: torch.dtype


def open_trained(
    run: str,
    world: World,
    use: Use,
    changes: dict[str, Any] | None = None,
    configure: Callable[[dict[str, Any], str], Config] | None = None,
    option: str = "--run",
) -> Trained:
    """Find the checkpoint, its configuration and its tokenizer.

    Args:
        run: Folder of a run, whose newest checkpoint is opened, or folder of a checkpoint.
        world: Place of this process among the ranks.
        use: Settings of the use.
        changes: Fields of the configuration that this use sets.
        configure: Function that makes the configuration from its values and their origin; None: they are validated
            without changes.
        option: Name of the option for the run, for messages.

    Raises:
        UsageError: If there is no checkpoint, or its model or tokenizer differs from the configuration's.
    """
    manifest = read_manifest(find_checkpoint_folder(run, option))
    device = choose_device(use.device, world)
    export_world(world, device)
    precision = _precision(use.precision, manifest, device, option)
    # Optimizer and sinks may be of packages that are not here: they have nothing to do with the model.
    kept = {name: values for name, values in manifest.config.items() if name not in ("optim", "telemetry")}
    values = merge(merge(kept, _layout(use, precision)), changes or {})
    if precision != "fp32" and values["parallel"].get("payload") == "bf16":
        values["parallel"]["payload"] = "model"  # it rounds to what the rows are already
    config = (configure or _validate)(values, str(manifest.folder))
    tokenizer = _tokenizer_of(manifest, config, world)
    resolved = resolve(config, world, describe_device(device), tokenizer.vocab_size, load_kinds(config))
    set_threads(config.parallel.threads_per_rank, world)
    if device.type == "cpu":
        keep_freed_memory()
    return Trained(manifest, resolved, tokenizer, world, device, torch_dtype(precision))


def load_model(trained: Trained) -> Transformer:
    """Verify every byte of the checkpoint, and load the model.

    Args:
        trained: Opened checkpoint, from `open_trained`.

    Returns:
        The model in evaluation mode, with the experts of this rank.

    Raises:
        UsageError: If the checkpoint has other tensors than the model.
        DamagedCheckpoint: If a file is damaged.

    Collective: All ranks.
    """
    config, world, manifest = trained.config, trained.world, trained.manifest
    parallel, placement = config.parallel, ExpertPlacement()
    if world.world_size > 1:
        init_process_group(world, trained.device, config.collective_seconds(trained.device.type))
        # In one hop and one chunk: for few tokens latency counts. The payload is that of training.
        size = parallel.expert_parallel_size
        mesh = create_mesh(size, config.collective_seconds(trained.device.type))
        placement = ExpertPlacement(
            mesh.expert.rank, size, mesh.dispatch_groups, parallel.dispatch, payload=parallel.payload
        )
    agree_on_kernels(trained.device, say_error if world.rank == 0 else lambda text: None)
    model = build_model(
        config.model,
        config.model.vocab_size,
        seed=config.train.seed,
        placement=placement,
        loss_chunk=config.train.loss_chunk_tokens,
    )
    check_fits(model, manifest)
    run_on_all_ranks(
        lambda: verify_files(manifest, sorted(manifest.files)[world.rank :: world.world_size]),
        lambda _: {"the checkpoint": f"{manifest.folder.name} of {manifest.step} steps"},
    )
    run_on_all_ranks(lambda: load_weights(model, manifest, dtype=trained.dtype, device=trained.device))
    return model.eval()


def sharing_ranks(trained: Trained) -> ContextRanks | None:
    """Create the groups of ranks that share sequences; None: every rank has whole sequences.

    Args:
        trained: Opened checkpoint, whose model is loaded.

    Collective: All ranks.
    """
    parallel = trained.config.parallel
    if parallel.context_parallel_size == 1:
        return None
    group = create_context_group(parallel.context_parallel_size, parallel.timeout_seconds)
    return ContextRanks(group.group, group.rank, group.size)


def _validate(values: dict[str, Any], origin: str) -> Config:
    return validate_config(values, origin=origin)


def _layout(use: Use, precision: Precision) -> dict[str, Any]:
    """Return the configuration fields that describe the layout and batch, with the values of this use."""
    return {
        "parallel": {
            "device": use.device,
            "expert_parallel_size": "auto" if use.expert_parallel_size is None else use.expert_parallel_size,
            "ranks_per_node": "auto",
            "threads_per_rank": use.threads or "auto",
            "context_parallel_size": use.context_parallel_size,
            "context_exchange": "all_gather",
        },
        "train": {"micro_batch_size": 1, "global_batch_size": None, "precision": precision},
    }


def _precision(
    setting: Precision | Literal["auto"], manifest: Manifest, device: torch.device, option: str
) -> Precision:
    if setting == "fp16" and device.type == "cpu":
        dashes = option.removesuffix("run")
        raise UsageError(f"{dashes}precision (fp16) needs {dashes}device cuda: on a CPU it is bf16 or fp32")
    if setting != "auto":
        return setting
    trained = manifest.config.get("train", {}).get("precision")
    if trained == "fp16" and device.type == "cuda":
        return "fp16"
    return "fp32" if trained == "fp32" else resolve_precision("auto", device)


def _tokenizer_of(manifest: Manifest, config: Config, world: World) -> Tokenizer:
    if manifest.tokenizer == ByteTokenizer().fingerprint:
        return ByteTokenizer()
    saved = Path(manifest.folder).resolve().parent.parent / "tokenizer.json"
    mark = config.data.end_of_document
    if saved.is_file():
        tokenizer: Tokenizer = load_tokenizer_file(saved, mark, "tokenizer")
        where = str(saved)
    else:  # an old run, which did not save its tokenizer
        tokenizer, where = find_tokenizer(config.data, local_rank=world.local_rank), "data.tokenizer"
    if tokenizer.fingerprint != manifest.tokenizer:
        raise UsageError(
            f"{where} is another tokenizer than {manifest.folder} was trained with: the same numbers would mean other "
            "text; put the run's tokenizer.json back"
        )
    return tokenizer
