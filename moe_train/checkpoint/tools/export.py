"""Export of weights alone: complete tensors in shards, with the index that Hugging Face's tools read."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_train.checkpoint.files import Advance, check_files, sync_folder, write_durably
from moe_train.checkpoint.manifest import DamagedCheckpoint, Manifest
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.tools.inspection import CHUNK
from moe_train.config.errors import UsageError
from moe_train.config.paths import is_remote, local_path
from moe_train.config.yaml_text import write_yaml
from moe_train.host.remote_files import open_remote, remote_errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SHARD_BYTES = 5_000_000_000  # the size that Hugging Face's tools write
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        folder: Folder of the export.
        tensors: Number of tensors, with buffers.
        bytes: Size of the tensors.
        shards: Number of shard files.
    """

    folder: str
    tensors: int
    bytes: int
    shards: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Item:
    """Tensor to write: one of the model's, or a buffer. A buffer is fp32, whatever dtype the weights have."""

    name: str
    shape: tuple[int, ...]
    is_buffer: bool
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_weights(
    manifest: Manifest,
    folder: Path | str,
    dtype: str = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance | None = None,
) -> Exported:
    """Write a checkpoint's weights and buffers, and the model's configuration. It needs the memory of one shard.

    Args:
        manifest: Manifest of the checkpoint; every byte of the checkpoint is read and verified first.
        folder: Folder to create; a URL: by fsspec, one file after the other by way of TMPDIR, and the index last.
        dtype: Dtype of the weights: fp32, bf16 or fp16; buffers are fp32.
        max_shard_bytes: Largest number of tensor bytes in a shard; a larger tensor gets a shard of its own.
        advance: Called with the number of bytes after each block that verification reads.

    Raises:
        UsageError: If the folder exists, or a weight does not fit the dtype.
        DamagedCheckpoint: If the checkpoint is damaged.
        OSError: If the folder cannot be written.
    """
    if isinstance(folder, str) and is_remote(folder):
        return _export_remote(manifest, folder, _plan_shards(_items(manifest, DTYPES[dtype]), max_shard_bytes), advance)
    folder = local_path(str(folder), "FOLDER")
    part = folder.with_name(f"{folder.name}.part")
    for path, why in ((folder, "exists"), (part, "exists, of an export under way or killed")):
        if path.exists() or path.is_symlink():
            raise UsageError(f"FOLDER ({str(path)!r}) {why}: give a new one, or remove it")
    _check_whole(manifest, advance)
    shards = _plan_shards(_items(manifest, DTYPES[dtype]), max_shard_bytes)
    part.mkdir(parents=True)
    try:
        exported = _write(manifest, part, shards)
        part.rename(folder)
    except BaseException:  # also an interrupt: no partly written export may stay
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return Exported(str(folder), *exported)


def _export_remote(manifest: Manifest, url: str, shards: list[list["_Item"]], advance: Advance | None) -> Exported:
    """Write an export to a remote file system, which renames no folder: only the index, the last file, completes it."""
    filesystem, root = open_remote(url, "FOLDER")
    with remote_errors(url, "FOLDER", "cannot be asked for"):
        if filesystem.exists(root):
            raise UsageError(f"FOLDER ({url!r}) exists: give a new one, or remove it")
    _check_whole(manifest, advance)

    def send(path: Path) -> None:
        with remote_errors(url, "FOLDER", f"{path.name} cannot be written"):
            filesystem.put_file(str(path), f"{root.rstrip('/')}/{path.name}")
        path.unlink()

    with tempfile.TemporaryDirectory(prefix="moe_train-export-") as scratch:
        with remote_errors(url, "FOLDER", "cannot be made"):
            filesystem.makedirs(root, exist_ok=True)  # object stores have no folders: nothing happens there
        try:
            exported = _write(manifest, Path(scratch), shards, send)
        except BaseException:  # also an interrupt
            with contextlib.suppress(Exception):  # the first error counts; the rest has no index
                filesystem.rm(root, recursive=True)
            raise
    return Exported(url, *exported)


def _check_whole(manifest: Manifest, advance: Advance | None) -> None:
    for _, damage in check_files(manifest, manifest.files, advance):
        if damage is not None:
            raise damage


def _items(manifest: Manifest, dtype: torch.dtype) -> list[_Item]:
    if twice := manifest.shapes.keys() & manifest.buffers.keys():
        raise DamagedCheckpoint(f"{manifest.folder}: {sorted(twice)[0]!r} is both a tensor and a buffer")
    weights = [_Item(name, shape, False, dtype) for name, shape in manifest.shapes.items()]
    buffers = [_Item(name, (len(values),), True, torch.float32) for name, values in manifest.buffers.items()]
    return sorted([*weights, *buffers], key=lambda item: item.name)


def _plan_shards(items: list[_Item], max_bytes: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.num_bytes
    return shards


def _write(
    manifest: Manifest, part: Path, shards: list[list[_Item]], finish: Callable[[Path], object] = lambda path: None
) -> tuple[int, int, int]:
    """Write the files of an export, the index last; `finish` is called with each of them."""
    weight_map: dict[str, str] = {}
    with RangeReader(manifest) as reader:
        for number, items in enumerate(shards, start=1):
            path = part / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(path, {item.name: _read(manifest, reader, item) for item in items})
            finish(path)
            weight_map |= {item.name: path.name for item in items}
    total = sum(item.num_bytes for items in shards for item in items)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    model = write_yaml({"model": manifest.config.get("model", {})})
    for name, text in (("config.yaml", model), (INDEX, json.dumps(index, indent=2) + "\n")):
        write_durably(part / name, text)
        finish(part / name)
    sync_folder(part)
    return len(weight_map), total, len(shards)


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    sync_folder(path)  # this flushes a file as well


def _read(manifest: Manifest, reader: RangeReader, item: _Item) -> Tensor:
    """Read a complete tensor in parts, so that it never exists a second time in fp32."""
    if item.is_buffer:
        return torch.tensor(manifest.buffers[item.name], dtype=torch.float64).to(item.dtype)
    whole = torch.empty(math.prod(item.shape), dtype=item.dtype)
    for start in range(0, whole.numel(), CHUNK):
        end = min(start + CHUNK, whole.numel())
        wide = reader.read(item.name, "weight", start, end)
        narrow = whole[start:end].copy_(wide)
        if item.dtype == torch.float16 and (lost := int((narrow.isinf() & wide.isfinite()).sum())):
            raise UsageError(
                f"--dtype (fp16): {item.name} has values beyond 65504, which fp16 does not hold "
                f"({lost} from element {start} on): choose bf16 or fp32"
            )
    return whole.view(item.shape)  # (N) -> its global shape
