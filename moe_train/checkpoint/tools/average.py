"""Average of the weights of several checkpoints of one model, as a checkpoint without moments.

Source: Izmailov et al. 2018, arXiv 1803.05407 (averages over the end of a run).
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from moe_train.checkpoint.files import Advance, check_files, sync_folder, write_durably
from moe_train.checkpoint.folders import begin_checkpoint, complete_checkpoint
from moe_train.checkpoint.manifest import FORMAT_VERSION, Manifest
from moe_train.checkpoint.matching import check_same_buffers, check_same_model
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.tensor_files import FILE_ELEMENTS, TensorFiles
from moe_train.checkpoint.tools.inspection import read_chunks
from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml, validate_config

_LAYOUT = {"world_size": 1, "expert_parallel_size": 1, "zero_stage": 1}


def average_checkpoints(
    manifests: Sequence[Manifest], output: Path, advance: Advance | None = None, file_elements: int = FILE_ELEMENTS
) -> Path:
    """Write a new run folder whose checkpoint has the mean of several checkpoints' weights and buffers.

    Every byte is verified first. The checkpoint has the step, the place in the data and the configuration of the newest
    one; the run that goes on from it begins with moments of zero.

    Args:
        manifests: Manifests of at least two checkpoints of the same model and tokenizer.
        output: The new run's folder.
        advance: Called with the number of bytes that the verification has read since the last call.
        file_elements: Most weights per file.

    Returns:
        Folder of the new checkpoint.

    Raises:
        UsageError: If models or tokenizers differ, or the output exists.
        DamagedCheckpoint: If a checkpoint is damaged.
        OSError: If the output cannot be written.
    """
    newest = max(manifests, key=lambda manifest: manifest.step)
    part = output.with_name(f"{output.name}.part")
    for path, why in ((output, "exists"), (part, "exists, of an average under way or killed")):
        if path.exists() or path.is_symlink():
            raise UsageError(f"--output ({str(path)!r}) {why}: give a new one, or remove it")
    for manifest in manifests:
        check_same_model(manifest, newest.shapes)
        check_same_buffers(manifest, {name: len(values) for name, values in newest.buffers.items()})
        if manifest.tokenizer != newest.tokenizer:
            raise UsageError(f"{manifest.folder} has another tokenizer than {newest.folder}: their tokens differ")
        for _, damage in check_files(manifest, manifest.files, advance):
            if damage is not None:
                raise damage
    part.mkdir(parents=True)
    try:
        checkpoint = _write(part, manifests, newest, output, file_elements)
        part.rename(output)
    except BaseException:  # an interrupt too: no incomplete folder stays
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(output.parent)
    return output / checkpoint.relative_to(part)


def _write(part: Path, manifests: Sequence[Manifest], newest: Manifest, output: Path, file_elements: int) -> Path:
    config = validate_config(newest.config, origin=str(newest.folder))
    train = config.train.model_copy(update={"run_dir": str(output)})
    resume = config.checkpoint.model_copy(update={"resume": "auto", "init_from": None})
    config = config.model_copy(update={"train": train, "checkpoint": resume})
    write_durably(part / "config.yaml", dump_yaml(config))
    tokenizer = newest.folder.resolve().parent.parent / "tokenizer.json"
    if tokenizer.is_file():
        write_durably(part / "tokenizer.json", tokenizer.read_text(encoding="utf-8"))
    folder = begin_checkpoint(part / "checkpoints", newest.step)
    elements = sum(math.prod(shape) for shape in newest.shapes.values())
    files = TensorFiles(folder, min(file_elements, elements), moments=())
    with ExitStack() as stack:
        readers = [stack.enter_context(RangeReader(manifest)) for manifest in manifests]
        for name in newest.shapes:
            for block in _mean_blocks(readers, name):
                files.add(name, block)
    own = {name: [each.buffers.get(name, values) for each in manifests] for name, values in newest.buffers.items()}
    values = {
        "format_version": FORMAT_VERSION,
        "step": newest.step,
        "consumed_sequences": newest.consumed_sequences,
        "tokenizer": newest.tokenizer,
        "guard": {"grad_norms": [], "skipped_steps": 0},
        "layout": _LAYOUT,
        "config": config.model_dump(mode="json"),
        "data": list(newest.data),
        "optimizer_step": 0,
        "loss_scale": newest.loss_scale,
        "buffers": {name: [sum(column) / len(lists) for column in zip(*lists)] for name, lists in own.items()},
        "moments": [],
        "tensors": {name: list(shape) for name, shape in newest.shapes.items()},
        "files": files.finish(),
    }
    complete = complete_checkpoint(folder, values)
    sync_folder(part)
    return complete


def _mean_blocks(readers: Sequence[RangeReader], name: str) -> Iterator[Tensor]:
    """Compute the mean of a tensor in blocks; the sum is in fp64. fp32, 1-D."""
    for blocks in zip(*(read_chunks(reader, reader.manifest, name, "weight") for reader in readers), strict=True):
        total = blocks[0].double()
        for block in blocks[1:]:
            total += block
        yield (total / len(blocks)).float()
