"""Tensor files of a checkpoint: written in one pass together with their digest, and verified.

The format is safetensors: a header in JSON, then the tensors' bytes. This file writes the format itself, because the
library would copy every tensor once more before writing, and gives no digest. The library reads the files.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_train.checkpoint.manifest import DamagedCheckpoint, Manifest, cannot_read, regular_size

_BLOCK = 1 << 24  # bytes per read, hash or write
_ALIGNMENT = 8  # bytes, of the tensors' start behind the header

Advance = Callable[[int], object]  # called with the number of bytes read since the previous call


@dataclass(frozen=True)
class WrittenFile:
    """Digest and size of a file that was written.

    Attributes:
        digest: xxh3_128 of the file, in hexadecimal.
        num_bytes: Size of the file.
    """

    digest: str
    num_bytes: int


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Write fp32 tensors to a new file, and flush it to the disk.

    Args:
        path: Path of the new file.
        tensors: Tensors by name: 1-D, fp32, contiguous, on the CPU.

    Returns:
        Digest and size of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    digest, num_bytes = xxhash.xxh3_128(), 0
    header = _header(tensors)
    with path.open("wb", buffering=0) as file:
        _reserve(file.fileno(), len(header) + sum(tensor.nbytes for tensor in tensors.values()))
        for block in _blocks(header, tensors):
            written = 0
            while written < len(block):  # an unbuffered write may write less than the block
                written += file.write(block[written:])
            digest.update(block)
            num_bytes += len(block)
        os.fsync(file.fileno())
    return WrittenFile(digest.hexdigest(), num_bytes)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Make the disk allocate the file's space.

    Writing then takes about a tenth less time (ext4), and a full disk is found before anything is written.
    """
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # file systems without this call
            raise


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.dim() == 1
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors.values():
        content = memoryview(tensor.numpy().data).cast("B")
        for start in range(0, len(content), _BLOCK):
            yield content[start : start + _BLOCK]


def verify_files(manifest: Manifest, files: Iterable[str]) -> None:
    """Read some of a checkpoint's files, and compare them with the manifest.

    Args:
        manifest: Manifest of the checkpoint.
        files: Names of the files to read.

    Raises:
        DamagedCheckpoint: If a file is not what was written; for the first such file.
    """
    for _, damage in check_files(manifest, files):
        if damage is not None:
            raise damage


def check_files(
    manifest: Manifest, files: Iterable[str], advance: Advance | None = None
) -> Iterator[tuple[str, DamagedCheckpoint | None]]:
    """Read some of a checkpoint's files, one after the other, and compare them with the manifest.

    Args:
        manifest: Manifest of the checkpoint.
        files: Names of the files to read.
        advance: Called after each block with the number of bytes read.

    Yields:
        Name of each file and its damage; None: the file is as it was written.
    """
    pieces: dict[str, dict[str, list[int]]] = {file: {} for file in files}
    for name, found in manifest.pieces.items():
        for piece in found:
            if piece.file in pieces:
                pieces[piece.file] |= {f"{kind}/{name}": [piece.numel] for kind in manifest.kinds_of(name)}
    for file, expected in pieces.items():
        try:
            _verify_file(manifest, file, expected, advance)
        except DamagedCheckpoint as damage:
            yield file, damage
        else:
            yield file, None


def _verify_file(manifest: Manifest, file: str, expected: dict[str, list[int]], advance: Advance | None) -> None:
    path, entry = manifest.folder / file, manifest.files[file]
    try:
        size = regular_size(path)
        if entry.num_bytes is not None and size != entry.num_bytes:
            raise DamagedCheckpoint(f"{path} is damaged: it has {size} bytes, the manifest says {entry.num_bytes}")
        if file_digest(path, entry.algorithm, advance) != entry.digest:
            raise DamagedCheckpoint(f"{path} is damaged: its digest differs from the manifest's")
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            lengths = {name: found.get_shape() for name, found in slices.items()}
            types = {found.get_dtype() for found in slices.values()}
    except (OSError, RuntimeError, SafetensorError) as error:  # torch maps the file and raises RuntimeErrors
        raise cannot_read(path, error) from error
    if lengths != expected or types - {"F32"}:
        raise DamagedCheckpoint(f"{path} does not hold the ranges that the manifest names")


def file_digest(path: Path, algorithm: str, advance: Advance | None = None) -> str:
    """Compute the digest of a file's bytes, in hexadecimal.

    Args:
        path: The file.
        algorithm: xxh3_128 or blake2b.
        advance: Called after each block with the number of bytes read.
    """
    digest: Any = xxhash.xxh3_128() if algorithm == "xxh3_128" else hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(min(_BLOCK, os.fstat(file.fileno()).st_size + 1)))
        while read := file.readinto(block):
            digest.update(block[:read])
            if advance is not None:
                advance(read)
    return str(digest.hexdigest())


def write_durably(path: Path, text: str) -> None:
    """Write a small text file, and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
