"""Conversion of a checkpoint to fewer key/value heads or layers, by averaging them; the result is ready for uptraining.

MHA becomes GQA or MQA by means over heads, and MLKV by means over layers. The conversion reads the files of a
checkpoint and writes a new run folder. Its checkpoint of step 0 is where the train command resumes.

Source: Ainslie et al. 2023, arXiv 2305.13245 (heads); Zuhri et al. 2024, arXiv 2406.09297 (layers).
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_train.checkpoint.files import Advance, check_files, sync_folder, write_durably
from moe_train.checkpoint.folders import begin_checkpoint, complete_checkpoint, step_folder
from moe_train.checkpoint.manifest import FORMAT_VERSION, Manifest
from moe_train.checkpoint.matching import check_same_model
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.tensor_files import FILE_ELEMENTS, TensorFiles
from moe_train.checkpoint.tools.inspection import read_chunks
from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml, validate_config
from moe_train.config.model import ModelConfig
from moe_train.config.root import Config
from moe_train.interop.reduction import KINDS, Reduction, cache_elements, check_heads, check_reduces
from moe_train.interop.widening import plan_widening, widened_blocks, widened_widths
from moe_train.model.build import build_model
from moe_train.model.moe.balance.base import Scheduled
from moe_train.model.parameters import logical_tensors
from moe_train.train.run_folder import RunFolder

UPTRAINING_SHARE = 0.05  # share of the source's steps, which gives the number of tokens of Zuhri et al.
_ELEMENT_BYTES = 4  # bytes per element of a KV cache in fp32
_LAYOUT = {"world_size": 1, "expert_parallel_size": 1, "zero_stage": 1}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ConversionRequest:
    """Settings of a conversion.

    Attributes:
        output: Folder of the new run.
        num_kv_heads: Number of key/value heads; None: as many as in the source.
        kv_layers: Layers that own keys and values, as a number or a list; None: the owner layers of the source.
        steps: Steps of uptraining; None: UPTRAINING_SHARE of the source's steps.
        widen_mlp: Whether to widen the MLPs by the parameters that the reduction saves.
    """

    output: Path
    num_kv_heads: int | None = None
    kv_layers: int | tuple[int, ...] | None = None
    steps: int | None = None
    widen_mlp: bool = False


@dataclass(frozen=True)
class Change:
    """Value of a quantity before and after the conversion."""

    before: int
    after: int


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    Attributes:
        output: Folder of the new run.
        checkpoint: Folder of its checkpoint of step 0.
        num_kv_heads: Number of key/value heads of an owner layer.
        kv_layers: Layers that own keys and values.
        parameters: Number of parameters of the model.
        kv_cache_bytes_per_token: Bytes of keys and values per token of one sequence, in fp32: 2 M G d 4.
        intermediate_size: Inner width of a dense SwiGLU.
        expert_intermediate_size: Inner width of an expert.
        steps: Steps of uptraining.
    """

    output: str
    checkpoint: str
    num_kv_heads: int
    kv_layers: tuple[int, ...]
    parameters: Change
    kv_cache_bytes_per_token: Change
    intermediate_size: int
    expert_intermediate_size: int
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values for JSON."""
        return asdict(self)


def convert_attention(
    manifest: Manifest, request: ConversionRequest, advance: Advance | None = None, file_elements: int = FILE_ELEMENTS
) -> Converted:
    """Convert a checkpoint to fewer keys and values, and write a new run folder with a checkpoint of step 0.

    Every byte of the source checkpoint is read and verified first. The memory needed is the weights of two files and
    one head.

    Args:
        manifest: Manifest of the source checkpoint.
        request: Settings of the conversion.
        advance: Called with the number of bytes that the verification has read since the last call.
        file_elements: Most weights per file.

    Returns:
        Paths and sizes of the result.

    Raises:
        UsageError: If the request does not fit the model, or the output folder exists.
        DamagedCheckpoint: If the source checkpoint is damaged.
        OSError: If the output cannot be written.
    """
    output = request.output
    if output.name in ("", ".."):
        raise UsageError(f"--output ({str(output)!r}) must be a new folder's name")
    part = output.with_name(f"{output.name}.part")
    for path, why in ((output, "exists"), (part, "exists, of a conversion under way or killed")):
        if path.exists() or path.is_symlink():
            raise UsageError(f"--output ({str(path)!r}) {why}: give a new one, or remove it")
    source = validate_config(manifest.config, origin=str(manifest.folder))
    check_same_model(manifest, _shapes(source.model))
    config = uptraining_config(manifest, source, request)
    shapes = _shapes(config.model)
    for _, damage in check_files(manifest, manifest.files, advance):
        if damage is not None:
            raise damage
    part.mkdir(parents=True)
    try:
        _write_run(part, manifest, source, config, shapes, file_elements)
        part.rename(output)
    except BaseException:  # an interrupt too: no incomplete folder stays
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(output.parent)
    old, new = source.model, config.model
    return Converted(
        output=str(output),
        checkpoint=str(step_folder(RunFolder(output).checkpoints, 0)),
        num_kv_heads=new.attention_kv_heads,
        kv_layers=new.kv_owner_layers,
        parameters=Change(_count(manifest.shapes), _count(shapes)),
        kv_cache_bytes_per_token=Change(*(2 * _ELEMENT_BYTES * cache_elements(model) for model in (old, new))),
        intermediate_size=new.intermediate_size,
        expert_intermediate_size=new.expert_intermediate_size,
        steps=config.train.steps,
    )


def uptraining_config(manifest: Manifest, source: Config, request: ConversionRequest) -> Config:
    """Make the configuration of the run that trains the smaller model further.

    The warm-up keeps its share of the steps. Scheduled balance weights keep the value that they have at the step of the
    checkpoint. Expert-parallel size and micro-batch size become "auto".

    Args:
        manifest: Manifest of the source checkpoint.
        source: Configuration of the source run.
        request: Settings of the conversion.

    Returns:
        The checked configuration of the new run.

    Raises:
        UsageError: If the request does not fit the model.
    """
    steps = request.steps if request.steps is not None else max(1, round(UPTRAINING_SHARE * source.train.steps))
    share = min(1.0, steps / source.train.steps)
    values = source.model_dump(mode="json")
    values["parallel"] |= {"expert_parallel_size": "auto", "context_parallel_size": 1, "context_exchange": "all_gather"}
    values["train"] |= {"run_dir": str(request.output), "steps": steps}
    if source.train.global_batch_size is not None:  # the configuration of a run always has one
        values["train"]["micro_batch_size"] = "auto"
    values["optim"]["warmup_steps"] = math.ceil(share * source.optim.warmup_steps)
    values["checkpoint"]["resume"] = "auto"
    values["model"]["moe"]["coef_schedules"] = {
        name: [[0, Scheduled(None, points).factor(manifest.step)]]
        for name, points in source.model.moe.coef_schedules.items()
    }
    if request.num_kv_heads is not None:
        values["model"]["num_kv_heads"] = request.num_kv_heads
        check_heads(source.model, request.num_kv_heads)
    if request.kv_layers is not None:
        values["model"]["kv_layers"] = request.kv_layers
    config = validate_config(values)
    check_reduces(source.model, config.model)
    _check_other_mixers(source.model, config.model)
    if not request.widen_mlp:
        return config
    if source.model.feed_forward != "swiglu" and len(source.model.moe_layer_indices) < source.model.num_layers:
        raise UsageError(f"--widen-mlp widens SwiGLUs only; the source's feed_forward is {source.model.feed_forward!r}")
    spare = _count(manifest.shapes) - _count(_shapes(config.model))
    widths = widened_widths(config.model, plan_widening(config.model, spare))
    values["model"]["intermediate_size"] = widths["intermediate_size"]
    values["model"]["moe"]["intermediate_size"] = widths["moe.intermediate_size"]
    return validate_config(values)


def _check_other_mixers(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse what would change a layer that is not attention: the means of its heads do not compute the same."""
    before, after = _shapes(source), _shapes(target)
    for layer in sorted(set(range(source.num_layers)) - set(source.attention_layers)):
        if any(before[name] != after[name] for name in after if name.startswith(f"blocks.{layer}.mixer.")):
            raise UsageError(
                f"--num-kv-heads ({target.attention_kv_heads}) would change layer {layer} too, whose mixer is "
                f"{source.layer_mixers[layer]!r}: only attention can be converted"
            )


def _shapes(model: ModelConfig) -> Shapes:
    if model.vocab_size is None:
        raise UsageError("the checkpoint's configuration has no model.vocab_size (None): it was not written by a run")
    return {name: tensor.shape for name, tensor in logical_tensors(build_model(model, model.vocab_size)).items()}


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _write_run(
    part: Path, manifest: Manifest, source: Config, config: Config, shapes: Shapes, file_elements: int
) -> None:
    folder = RunFolder(part)
    write_durably(folder.config, dump_yaml(config))
    tokenizer = RunFolder(manifest.folder.resolve().parent.parent).tokenizer
    if tokenizer.is_file():
        write_durably(folder.tokenizer, tokenizer.read_text(encoding="utf-8"))
    checkpoint = begin_checkpoint(folder.checkpoints, 0)
    files = TensorFiles(checkpoint, min(file_elements, _count(shapes)))
    with RangeReader(manifest) as reader:
        for name in shapes:
            for block in _blocks(reader, manifest, source, config, name, shapes[name]):
                files.add(name, block)
    placed = {
        "parallel": config.parallel.model_copy(update={"expert_parallel_size": _LAYOUT["expert_parallel_size"]}),
        "train": config.train.model_copy(update={"micro_batch_size": source.train.micro_batch_size}),
    }
    values = {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "consumed_sequences": manifest.consumed_sequences,  # the new run continues to read the data there
        "tokenizer": manifest.tokenizer,
        "guard": {"grad_norms": [], "skipped_steps": 0},
        "layout": _LAYOUT,
        "config": config.model_copy(update=placed).model_dump(mode="json"),
        "optimizer_step": 0,
        "loss_scale": _loss_scale(manifest, config),
        "buffers": manifest.buffers,
        "tensors": {name: list(shape) for name, shape in shapes.items()},
        "files": files.finish(),
    }
    complete_checkpoint(checkpoint, values)
    sync_folder(part)


def _loss_scale(manifest: Manifest, config: Config) -> float:
    """Choose the loss scale: the source's, which fits its gradients, or a new run's if lower; 1 without fp16."""
    if config.train.precision != "fp16":
        return 1.0
    fp16 = config.deepspeed.get("fp16", {})
    if fixed := fp16.get("loss_scale"):
        return float(fixed)
    return min(manifest.loss_scale, 2.0 ** fp16.get("initial_scale_power", 16))  # deepspeed 0.19.8's default


def _blocks(
    reader: RangeReader, manifest: Manifest, source: Config, config: Config, name: str, shape: tuple[int, ...]
) -> Iterator[Tensor]:
    """Compute a tensor of the new model, flattened, in blocks."""
    layer, _, kind = name.removeprefix("blocks.").removesuffix(".weight").partition(".mixer.")
    if kind in KINDS and int(layer) in source.model.attention_layers:
        return Reduction(source.model, config.model).mean_blocks(reader, int(layer), kind)
    before = manifest.shapes[name]
    if before == shape:
        return read_chunks(reader, manifest, name, "weight")
    return widened_blocks(reader, name, before, shape, config.train.seed, config.model.init_std)
