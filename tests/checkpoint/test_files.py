"""Tensor files: what is written is read bit for bit, and any file that was not is found."""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moe_train.checkpoint.files import verify_files, write_tensor_file
from moe_train.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest, Piece, read_manifest
from tests.checkpoint.made import make_checkpoint

# NaNs with payloads, quiet and signalling, both zeros, both infinities, the least and the largest numbers.
BITS = (0x7FC00001, 0x7F800001, 0xFFC12345, 0x80000000, 0, 0x7F800000, 0xFF800000, 1, 0x7F7FFFFF)


def from_bits(bits: tuple[int, ...] | list[int]) -> torch.Tensor:
    return torch.frombuffer(bytearray(struct.pack(f"<{len(bits)}I", *bits)), dtype=torch.float32)


def test_special_values_and_empty_tensors_are_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"weight/a": from_bits(BITS), "weight/empty": torch.empty(0), 'exp_avg/ä "b"': torch.arange(3.0)}
    written = write_tensor_file(tmp_path / "file", tensors)
    content = (tmp_path / "file").read_bytes()
    assert written.num_bytes == len(content) and written.digest == xxhash.xxh3_128_hexdigest(content)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name
    write_tensor_file(tmp_path / "none", {})
    assert load_file(tmp_path / "none") == {}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.lists(st.integers(0, 2**32 - 1), max_size=9)))
def test_any_bits_under_any_names(tmp_path_factory: pytest.TempPathFactory, values: dict[str, list[int]]) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    tensors = {f"weight/{name}": from_bits(bits) if bits else torch.empty(0) for name, bits in values.items()}
    write_tensor_file(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


def manifest_of(folder: Path, content: bytes, numel: int) -> Manifest:
    """A manifest that a file fits in size and digest, whatever is in it."""
    file = "rank_00000.safetensors"
    (folder / file).write_bytes(content)
    entry = FileEntry("xxh3_128", xxhash.xxh3_128_hexdigest(content), len(content))
    pieces = {"a": [Piece(0, numel, file)]}
    return Manifest(folder, 3, 1, 1, 1, 1.0, "", {"a": (numel,)}, pieces, {file: entry}, {})


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def described(**changes: Any) -> bytes:
    sizes = [("weight/a", 0), ("exp_avg/a", 8), ("exp_avg_sq/a", 16)]
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in sizes}
    header["weight/a"] |= changes
    return json.dumps(header).encode()


HOSTILE = {
    "empty": b"",
    "a short length": b"\1\0",
    "no header": with_header(b""),
    "no tensors": with_header(b"{}"),
    "a huge length": with_header(described(), bytes(24), 2**64 - 1),
    "a length past the end": with_header(described(), bytes(24), 10**6),
    "overlapping": with_header(described(data_offsets=[8, 16]), bytes(24)),
    "backwards": with_header(described(data_offsets=[8, 0]), bytes(24)),
    "negative": with_header(described(data_offsets=[-8, 0]), bytes(24)),
    "another type": with_header(described(dtype="I32"), bytes(24)),
    "a type of less than a byte": with_header(described(dtype="F4"), bytes(24)),
    "no type": with_header(described(dtype=None), bytes(24)),
    "another shape": with_header(described(shape=[1, 2]), bytes(24)),
    "a huge shape": with_header(described(shape=[2**63, 2**63]), bytes(24)),
    "too little data": with_header(described(), bytes(20)),
    "too much data": with_header(described(), bytes(28)),
    "nested": with_header(b"[" * 100_000),
    "nested objects": with_header(b'{"a":' * 100_000),
    "no text": with_header(b"\xff" * 64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_that_fits_its_digest_is_refused(tmp_path: Path, name: str) -> None:
    manifest = manifest_of(tmp_path, HOSTILE[name], 2)
    with pytest.raises(DamagedCheckpoint, match="rank_00000"):
        verify_files(manifest, manifest.files)


def test_the_header_that_those_were_made_of_is_sound(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, with_header(described(), bytes(24)), 2)
    verify_files(manifest, manifest.files)


OFFSETS = st.lists(st.one_of(st.integers(-(2**65), 2**65), st.integers(0, 32)), max_size=3)
HEADERS = st.dictionaries(
    st.sampled_from(["weight/a", "exp_avg/a", "exp_avg_sq/a", "__metadata__", "b"]),
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "BF16", "F4", ""]), "shape": OFFSETS, "data_offsets": OFFSETS}
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    header=st.one_of(st.binary(max_size=64), HEADERS.map(lambda header: json.dumps(header).encode())),
    data=st.binary(max_size=32),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_any_header_is_refused(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes, length: int | None
) -> None:
    # 3 elements of each kind take 36 bytes, which the data never has.
    manifest = manifest_of(tmp_path_factory.getbasetemp(), with_header(header, data, length), 3)
    with pytest.raises(DamagedCheckpoint):
        verify_files(manifest, manifest.files)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "missing"])
def test_what_is_no_regular_file_is_damage_and_does_not_block(tmp_path: Path, kind: str) -> None:
    folder = make_checkpoint(tmp_path)
    path = folder / "rank_00001.safetensors"
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    manifest = read_manifest(folder)
    verify_files(manifest, ["rank_00000.safetensors"])
    with pytest.raises(DamagedCheckpoint, match="rank_00001"):
        verify_files(manifest, manifest.files)


def test_ranges_that_the_manifest_does_not_name_are_damage(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, world_size=1)
    manifest = read_manifest(folder)
    name, found = next((name, found) for name, found in manifest.pieces.items() if found)
    manifest.pieces[name] = [Piece(0, math.prod(manifest.shapes[name]) - 1, found[0].file)]
    with pytest.raises(DamagedCheckpoint, match="does not hold the ranges"):
        verify_files(manifest, manifest.files)
