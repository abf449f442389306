"""Checkpoints of flat ranges: every rank writes what it owns, and any layout reads what it needs.

A step's folder holds one safetensors file a rank and manifest.json with every tensor's global shape and where its
ranges are. It is written under a temporary name and renamed when complete; `latest` is replaced last. Nothing is
unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_train.config.errors import UsageError
from moe_train.parallel.collectives import gather_objects
from moe_train.train.agreement import together
from moe_train.train.engine import STATE_KINDS, Fragment, TrainEngine
from moe_train.train.manifest import FORMAT_VERSION, Manifest

_FOLDER = re.compile(r"step_(\d{8})")
_HASH_BLOCK = 1 << 24  # bytes


def save_checkpoint(
    engine: TrainEngine,
    checkpoints: Path,
    rank: int,
    *,
    step: int,
    consumed_sequences: int,
    tokenizer: str,
    config: dict[str, Any],
) -> Path:
    """Write the model and optimizer state.

    Args:
        engine: Whose state to save.
        checkpoints: The run's checkpoint folder, seen by all ranks.
        rank: This rank.
        step: Optimizer steps done.
        consumed_sequences: Sequences trained on.
        tokenizer: Fingerprint of the tokenizer.
        config: Resolved configuration, as plain values.

    Returns:
        The step's folder.

    Raises:
        RuntimeError: On every rank, if one could not write; what was saved before is untouched.

    Collective: All ranks.
    """
    final, part = checkpoints / f"step_{step:08d}", checkpoints / f"step_{step:08d}.part"
    together(lambda: _make_empty(part) if rank == 0 else None)
    written = gather_objects(together(lambda: _write_ranges(engine, part / f"rank_{rank:05d}.safetensors")))
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "consumed_sequences": consumed_sequences,
        "optimizer_step": engine.optimizer_step,
        "loss_scale": engine.loss_scale,
        "tokenizer": tokenizer,
        "buffers": {name: buffer.tolist() for name, buffer in engine.buffers().items()},
        "tensors": {name: list(shape) for entry in written for name, shape in entry["shapes"].items()},
        "files": {e["file"]: {"blake2b": e["digest"], "ranges": e["ranges"]} for e in written if e["ranges"]},
        "config": config,
    }
    together(lambda: _complete(part, final, manifest) if rank == 0 else None)
    return final


def _make_empty(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed while saving
    part.mkdir(parents=True)


def _complete(part: Path, final: Path, manifest: dict[str, Any]) -> None:
    _write_durably(part / "manifest.json", json.dumps(manifest, indent=1))
    _sync_folder(part)
    shutil.rmtree(final, ignore_errors=True)
    part.replace(final)
    latest = final.parent / "latest.part"
    _write_durably(latest, final.name + "\n")
    latest.replace(final.parent / "latest")
    _sync_folder(final.parent)


def prune_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest keep_last complete checkpoints."""
    for folder in list_checkpoints(checkpoints)[:-keep_last]:
        shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed is no reason to end a run


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [folder for folder in checkpoints.iterdir() if _FOLDER.fullmatch(folder.name)]
    return sorted(folder for folder in found if (folder / "manifest.json").is_file())


def load_checkpoint(engine: TrainEngine, manifest: Manifest, rank: int, world_size: int) -> None:
    """Replace the engine's state by a checkpoint's, whatever layout wrote it. Each rank reads the ranges it owns.

    Args:
        engine: Of the same model, in any layout.
        manifest: From `read_manifest`.
        rank: This rank.
        world_size: Ranks.

    Raises:
        UsageError: On every rank alike, if the model differs or a file is damaged.

    Collective: All ranks.
    """
    ours = {tensor.name: tensor.shape for tensor in engine.logical_tensors}
    _check_same_model(manifest, ours)
    files = sorted(manifest.digests)
    together(lambda: _verify(manifest, files[rank::world_size]))
    buffers = engine.buffers()
    _check_same_buffers(manifest, {name: buffer.numel() for name, buffer in buffers.items()})
    with _Reader(manifest) as reader:
        engine.load_state(reader.read, manifest.optimizer_step, manifest.loss_scale)
    for name, values in manifest.buffers.items():
        buffers[name].copy_(torch.tensor(values, dtype=torch.float64))


class _Reader:
    """Reads ranges of logical tensors, opening each file once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()

    def read(self, fragment: Fragment, kind: str) -> Tensor:
        """A state kind of a fragment's range, put together from the pieces that hold it. fp32 [numel]."""
        name, start, end = fragment.tensor.name, fragment.start, fragment.start + fragment.numel
        pieces = self._manifest.pieces[name]
        first = bisect_right([piece.start for piece in pieces], start) - 1
        parts = []
        for piece in pieces[first:]:
            if piece.start >= end:
                break
            low, high = max(start, piece.start) - piece.start, min(end, piece.start + piece.numel) - piece.start
            parts.append(self._file(piece.file).get_slice(f"{kind}/{name}")[low:high])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._manifest.folder / name, framework="pt")
        return self._open[name]


def _write_ranges(engine: TrainEngine, path: Path) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    ranges: dict[str, tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for fragment in engine.fragments():
        name = fragment.tensor.name
        shapes[name], ranges[name] = fragment.tensor.shape, (fragment.start, fragment.numel)
        for kind in STATE_KINDS:
            # A copy: safetensors refuses tensors that share memory, and the fragments are views of one partition.
            tensors[f"{kind}/{name}"] = fragment.states[kind].detach().to("cpu", torch.float32, copy=True)
    if ranges:
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {"file": path.name, "digest": _digest(path) if ranges else "", "ranges": ranges, "shapes": shapes}


def _check_same_model(manifest: Manifest, ours: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(ours.keys() | manifest.shapes.keys()):
        here, there = ours.get(name), manifest.shapes.get(name)
        if here != there:
            raise UsageError(
                f"{manifest.folder} is of another model: tensor {name} is {list(there) if there else 'absent'} in the "
                f"checkpoint and {list(here) if here else 'absent'} in model; train.run_dir must be of the same model"
            )


def _check_same_buffers(manifest: Manifest, ours: dict[str, int]) -> None:
    """None at all is what a checkpoint without a bias has: one that is wanted now begins at zero."""
    theirs = {name: len(values) for name, values in manifest.buffers.items()}
    for name in sorted(theirs.keys() | (ours.keys() if theirs else set())):
        if name not in ours:
            raise UsageError(
                f"{manifest.folder} has {name}, which the model has no place for: keep model.moe.bias_update_rate "
                'above 0; a bias is held still by model.moe.coef_schedules={"bias_update_rate": [[0, 0]]}'
            )
        if ours[name] != theirs.get(name):
            raise UsageError(f"{manifest.folder}: {name} has {theirs.get(name, 0)} values, the model's {ours[name]}")


def _verify(manifest: Manifest, files: Sequence[str]) -> None:
    for file in files:
        path = manifest.folder / file
        try:
            if _digest(path) != manifest.digests[file]:
                raise UsageError(f"{path} is damaged: its digest differs from the manifest's")
            with safe_open(path, framework="pt") as opened:
                lengths = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        here = [(name, piece) for name, found in manifest.pieces.items() for piece in found if piece.file == file]
        if lengths != {f"{kind}/{name}": [piece.numel] for name, piece in here for kind in STATE_KINDS}:
            raise UsageError(f"{path} does not hold the ranges that the manifest names")


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
