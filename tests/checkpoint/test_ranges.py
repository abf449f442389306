"""Ranges are what slicing the whole tensors gives, whatever files they are in."""

import math
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.manifest import DamagedCheckpoint, read_manifest
from moe_train.checkpoint.ranges import RangeReader
from tests.checkpoint.made import KINDS, SHAPES, made_state, make_checkpoint


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_every_range_of_every_tensor(tmp_path: Path, world_size: int) -> None:
    state = made_state()
    manifest = read_manifest(make_checkpoint(tmp_path, world_size=world_size))
    with RangeReader(manifest) as reader:
        for name, shape in SHAPES.items():
            for kind in KINDS:
                for start in range(math.prod(shape) + 1):
                    for end in range(start, math.prod(shape) + 1):
                        found = reader.read(name, kind, start, end)
                        assert torch.equal(found, state[f"{kind}/{name}"][start:end]), (name, kind, start, end)


def test_a_file_that_is_gone_or_holds_something_else_is_damage(tmp_path: Path) -> None:
    folder, other = make_checkpoint(tmp_path), make_checkpoint(tmp_path / "other", world_size=5)
    manifest = read_manifest(folder)
    (other / "rank_00001.safetensors").replace(folder / "rank_00001.safetensors")
    (folder / "rank_00000.safetensors").unlink()
    for name in ("embedding.weight", "norm.weight"):
        with RangeReader(manifest) as reader, pytest.raises(DamagedCheckpoint, match="rank_0000"):
            reader.read(name, "weight", 0, math.prod(SHAPES[name]))
