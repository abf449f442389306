"""What a checkpoint says of itself: manifest.json, read without trust."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_train.config.errors import UsageError

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)  # 1 had no buffers
_FILE = re.compile(r"rank_\d{5}\.safetensors")


@dataclass(frozen=True)
class Piece:
    """A range of a logical tensor in a file: [start, start + numel)."""

    start: int
    numel: int
    file: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        folder: Where it is.
        step: Optimizer steps done.
        consumed_sequences: Sequences trained on.
        optimizer_step: Updates Adam has made.
        loss_scale: fp16's loss scale; 1 otherwise.
        tokenizer: Fingerprint of the tokenizer.
        shapes: Global shape of every logical tensor.
        pieces: Its ranges, in order.
        digests: blake2b of every file.
        buffers: Values of every buffer, such as the routers' biases.
        config: The run's resolved configuration.
    """

    folder: Path
    step: int
    consumed_sequences: int
    optimizer_step: int
    loss_scale: float
    tokenizer: str
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, list[Piece]]
    digests: dict[str, str]
    buffers: dict[str, list[float]]
    config: dict[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        UsageError: If it is missing, damaged, of another version, or names a file outside its folder.
    """
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format_version"] not in _READABLE_VERSIONS:
            readable = " and ".join(map(str, _READABLE_VERSIONS))
            raise UsageError(f"{path}: format version {raw['format_version']}; this program reads {readable}")
        shapes = {str(name): tuple(int(size) for size in shape) for name, shape in raw["tensors"].items()}
        pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
        for file, entry in raw["files"].items():
            if not _FILE.fullmatch(file):
                raise UsageError(f"{path}: {file!r} is not the name of a checkpoint file")
            for name, (start, numel) in entry["ranges"].items():
                pieces[name].append(Piece(int(start), int(numel), file))
        for name, found in pieces.items():
            found.sort(key=lambda piece: piece.start)
            _check_cover(path, name, torch.Size(shapes[name]).numel(), found)
        return Manifest(
            folder,
            int(raw["step"]),
            int(raw["consumed_sequences"]),
            int(raw["optimizer_step"]),
            float(raw["loss_scale"]),
            str(raw["tokenizer"]),
            shapes,
            pieces,
            {file: str(entry["blake2b"]) for file, entry in raw["files"].items()},
            _read_buffers(path, raw["buffers"] if raw["format_version"] > 1 else {}),
            raw["config"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not a manifest of a checkpoint: {type(error).__name__}: {error}") from error


def _check_cover(path: Path, name: str, numel: int, pieces: list[Piece]) -> None:
    end = 0
    for piece in pieces:
        if piece.start != end or piece.numel < 1:
            raise UsageError(f"{path}: tensor {name}: element {end} to {piece.start} is missing or there twice")
        end += piece.numel
    if end != numel:
        raise UsageError(f"{path}: tensor {name} has {end} of {numel} elements")


def _read_buffers(path: Path, raw: Any) -> dict[str, list[float]]:
    for name, values in raw.items():
        is_list = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not is_list or not all(math.isfinite(value) for value in values):
            raise UsageError(f"{path}: buffer {name} is not a list of finite numbers")
    return {str(name): [float(value) for value in values] for name, values in raw.items()}
