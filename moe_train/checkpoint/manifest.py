"""Manifest of a checkpoint: manifest.json, which describes the checkpoint and is read without trust."""

import errno
import json
import math
import re
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from moe_train.config.errors import UsageError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
# Version 1 had no buffers. Versions 1 and 2 had blake2b digests, and no manifest digest, sizes, layout, step control.
_READABLE_VERSIONS = (1, 2, 3)
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # of a checkpoint that names none
_FILE = re.compile(r"rank_[0-9]{5,}\.safetensors")
# Errors that say nothing about the data on the disk. A checkpoint must not be quarantined for them.
_PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
_DEEPEST = 30  # nesting of a configuration: the code that prints it is recursive
_MOST_BYTES = 1 << 30  # size of a manifest; manifests of the largest models have some megabytes
_MOST_ELEMENTS = 1 << 62  # elements of a tensor: the bytes of more do not fit in an int64
_MOST_DIMENSIONS = 64  # dimensions of a tensor, as in torch


def cannot_read(path: Path, error: Exception) -> UsageError:
    """Classify a read error: damage, or a disk, limit or permission that may soon be better.

    Args:
        path: File that was read.
        error: Error of reading it.

    Returns:
        DamagedCheckpoint for damage, a plain UsageError otherwise.
    """
    if isinstance(error, OSError) and error.errno in _PASSING:
        return UsageError(f"{path} cannot be read now: {error}")
    return DamagedCheckpoint(f"{path} cannot be read: {error}")


class DamagedCheckpoint(UsageError):
    """Error for a checkpoint that is not as it was written; an older one may be valid."""


@dataclass(frozen=True)
class Piece:
    """Range [start, start + numel) of a logical tensor in a file."""

    start: int
    numel: int
    file: str


@dataclass(frozen=True)
class FileEntry:
    """Entry of a tensor file in the manifest.

    Attributes:
        algorithm: Algorithm of the digest: xxh3_128, or blake2b in old checkpoints.
        digest: Digest of the whole file, in hexadecimal.
        num_bytes: Size of the file; None in old checkpoints.
    """

    algorithm: str
    digest: str
    num_bytes: int | None


@dataclass(frozen=True)
class StepControlState:
    """State of step control: gradient norms and skipped steps.

    Attributes:
        grad_norms: Global gradient norms of the last steps taken, oldest first.
        skipped_steps: Number of skipped steps in the whole run.
    """

    grad_norms: tuple[float, ...] = ()
    skipped_steps: int = 0


@dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint.

    Attributes:
        folder: Folder of the checkpoint.
        format_version: Version of the checkpoint format.
        step: Number of completed optimizer steps.
        consumed_sequences: Place in the data: number of sequences trained on or passed over.
        optimizer_step: Number of the optimizer's updates.
        loss_scale: Loss scale of fp16; 1 in another precision.
        tokenizer: Fingerprint of the tokenizer.
        shapes: Global shape of every logical tensor.
        pieces: Ranges of every logical tensor, in order.
        files: Tensor files by name.
        buffers: Values of every buffer, such as the routers' biases.
        step_control: State of step control.
        layout: world_size, expert_parallel_size, zero_stage and context_parallel_size that wrote it; old checkpoints
            lack the last, or all.
        config: Resolved configuration of the run.
        moments: Names of the optimizer's state tensors.
        data: Identity of each source of data, as JSON values; empty in old checkpoints.
        tensor_moments: State tensors of the logical tensors that have not all of `moments`, by the tensor's name.
    """

    folder: Path
    format_version: int
    step: int
    consumed_sequences: int
    optimizer_step: int
    loss_scale: float
    tokenizer: str
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, list[Piece]]
    files: dict[str, FileEntry]
    buffers: dict[str, list[float]]
    step_control: StepControlState = field(default_factory=StepControlState)
    layout: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    moments: tuple[str, ...] = ADAM_MOMENTS
    data: tuple[dict[str, Any], ...] = ()
    tensor_moments: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def optimizer(self) -> str:
        """Name of the optimizer whose moments it has."""
        return str(self.config.get("optim", {}).get("name", "adamw"))

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """Return the kinds of fp32 values that a logical tensor has: its weight and the optimizer's moments of it."""
        return ("weight", *self.tensor_moments.get(name, self.moments))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors: fp32 weights and moments."""
        return 4 * sum(len(self.kinds_of(name)) * math.prod(shape) for name, shape in self.shapes.items())


def encode_manifest(values: Mapping[str, Any]) -> str:
    """Encode a manifest as JSON with one key per line; the first key is the digest of the rest."""
    return _lines({"digest": _digest(values)} | dict(values))


def _digest(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "digest"}
    return xxhash.xxh3_128_hexdigest(_lines(rest).encode())


def _lines(values: Mapping[str, Any]) -> str:
    rows = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in values.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        DamagedCheckpoint: If it is missing, damaged, or names a file outside its folder.
        UsageError: If it has another format version, or cannot be read for a reason that may pass.
    """
    path = folder / MANIFEST
    try:
        text = read_regular_file(path, _MOST_BYTES)
        raw = json.loads(text)
        version = raw["format_version"]
        if type(version) is not int or version not in _READABLE_VERSIONS:
            if raw.get("digest") == _digest({**raw, "format_version": FORMAT_VERSION}):  # only the version is damaged
                raise DamagedCheckpoint(f"{path} is damaged: format_version is not as it was written")
            shown = reprlib.repr(version)
            raise UsageError(f"{path}: format version {shown}; this program reads {_READABLE_VERSIONS}")
        if version >= 3 or "digest" in raw:  # also a version 3 that was changed to 2
            _check_digest(path, raw, text)
        return _parse(folder, raw)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        if isinstance(error, OSError):
            raise cannot_read(path, error) from error
        raise DamagedCheckpoint(f"{path}: not a manifest of a checkpoint: {type(error).__name__}: {error}") from error


def read_regular_file(path: Path, most_bytes: int) -> str:
    """Read the text of a file that must be neither a link nor a device, and not larger than expected.

    Args:
        path: The file.
        most_bytes: Largest size.

    Raises:
        OSError: If it is a link or a device, is too large, or cannot be read.
        ValueError: If it is not UTF-8.
    """
    size = regular_size(path)
    if size > most_bytes:
        raise OSError(f"{size} bytes are more than {most_bytes}")
    return path.read_bytes().decode()  # reading in text mode would take a "\r" for the "\n" that was written


def regular_size(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Args:
        path: The file.

    Raises:
        OSError: If it does not exist or is not a regular file: a link may lead out of the folder, a pipe may block.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")
    return status.st_size


def _check_digest(path: Path, raw: dict[str, Any], text: str) -> None:
    # Encoded again from the values, so that a changed byte between the values is found too.
    rest = {name: value for name, value in raw.items() if name != "digest"}
    if encode_manifest(rest) != text:
        raise DamagedCheckpoint(f"{path} is damaged: its digest differs from what it holds")


def _parse(folder: Path, raw: dict[str, Any]) -> Manifest:
    path, version = folder / MANIFEST, raw["format_version"]
    shapes = {name: _read_shape(path, name, shape) for name, shape in raw["tensors"].items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for file, entry in raw["files"].items():
        if not _FILE.fullmatch(file):
            raise DamagedCheckpoint(f"{path}: {file!r} is not the name of a checkpoint file")
        for name, (start, numel) in entry["ranges"].items():
            pieces[name].append(Piece(_whole(path, name, start), _whole(path, name, numel), file))
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece.start)
        _check_cover(path, name, math.prod(shapes[name]), found)
    guard: dict[str, Any] = raw["guard"] if version >= 3 else {"grad_norms": [], "skipped_steps": 0}
    layout = raw["layout"] if version >= 3 else {}
    config = raw["config"]
    _check_depth(path, config)
    if not isinstance(config, dict):
        raise DamagedCheckpoint(f"{path}: config is not an object")
    for name, section in config.items():  # all that a configuration has, so that readers may look into them
        if not isinstance(section, dict):
            raise DamagedCheckpoint(f"{path}: config.{name} ({reprlib.repr(section)}) is not an object")
    return Manifest(
        folder=folder,
        format_version=version,
        step=_whole(path, "step", raw["step"]),
        consumed_sequences=_whole(path, "consumed_sequences", raw["consumed_sequences"]),
        optimizer_step=_whole(path, "optimizer_step", raw["optimizer_step"]),
        loss_scale=_positive(path, "loss_scale", raw["loss_scale"]),
        tokenizer=str(raw["tokenizer"]),
        shapes=shapes,
        pieces=pieces,
        files={file: _read_entry(path, file, entry, version) for file, entry in raw["files"].items()},
        buffers=_read_buffers(path, raw["buffers"] if version > 1 else {}),
        step_control=StepControlState(
            tuple(_finite(path, "guard.grad_norms", norm) for norm in guard["grad_norms"]),
            _whole(path, "guard.skipped_steps", guard["skipped_steps"]),
        ),
        layout={str(name): _whole(path, f"layout.{name}", value) for name, value in layout.items()},
        config=config,
        moments=_read_moments(path, raw.get("moments", ADAM_MOMENTS)),
        data=_read_data(path, raw.get("data", [])),
        tensor_moments={name: _read_moments(path, own) for name, own in raw.get("tensor_moments", {}).items()},
    )


def _whole(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST_ELEMENTS:
        raise DamagedCheckpoint(f"{path}: {name} ({reprlib.repr(value)}) is not a whole number of 0 or more")
    return value


def _finite(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DamagedCheckpoint(f"{path}: {name} ({reprlib.repr(value)}) is not a finite number")
    return float(value)


def _check_depth(path: Path, value: Any, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise DamagedCheckpoint(f"{path}: config is nested deeper than {_DEEPEST}")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _check_depth(path, child, depth + 1)


def _positive(path: Path, name: str, value: Any) -> float:
    number = _finite(path, name, value)
    if number <= 0:
        raise DamagedCheckpoint(f"{path}: {name} ({number:g}) is not above 0")
    return number


def _read_shape(path: Path, name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise DamagedCheckpoint(f"{path}: tensor {name} has no shape: {reprlib.repr(shape)}")
    sizes = tuple(_whole(path, name, size) for size in shape)
    if math.prod(sizes) >= _MOST_ELEMENTS:
        raise DamagedCheckpoint(f"{path}: tensor {name} has a shape of too many elements: {list(sizes)}")
    return sizes


def _read_entry(path: Path, file: str, entry: dict[str, Any], version: int) -> FileEntry:
    if version < 3:
        return FileEntry("blake2b", str(entry["blake2b"]), None)
    return FileEntry("xxh3_128", str(entry["xxh3_128"]), _whole(path, f"bytes of {file}", entry["bytes"]))


def _check_cover(path: Path, name: str, numel: int, pieces: list[Piece]) -> None:
    end = 0
    for piece in pieces:
        if piece.start != end or piece.numel < 1:
            raise DamagedCheckpoint(f"{path}: tensor {name}: element {end} to {piece.start} is missing or there twice")
        end += piece.numel
    if end != numel:
        raise DamagedCheckpoint(f"{path}: tensor {name} has {end} of {numel} elements")


def _read_moments(path: Path, names: Any) -> tuple[str, ...]:
    are_names = isinstance(names, list | tuple) and all(isinstance(n, str) and n.isidentifier() for n in names)
    if not are_names or "weight" in names or len(set(names)) != len(names):
        raise DamagedCheckpoint(f"{path}: moments ({reprlib.repr(names)}) are not names of optimizer states")
    return tuple(names)


def _read_data(path: Path, sources: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise DamagedCheckpoint(f"{path}: data ({reprlib.repr(sources)}) is not a list of sources")
    return tuple(sources)


def _read_buffers(path: Path, raw: Any) -> dict[str, list[float]]:
    for name, values in raw.items():
        is_list = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not is_list or not all(math.isfinite(value) for value in values):
            raise DamagedCheckpoint(f"{path}: buffer {name} is not a list of finite numbers")
    return {str(name): [float(value) for value in values] for name, values in raw.items()}
