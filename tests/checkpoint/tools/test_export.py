"""Exported weights: whole tensors that the safetensors library reads, and nothing half written."""

import json
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe_train.checkpoint.manifest import DamagedCheckpoint, read_manifest
from moe_train.checkpoint.tools import export, inspection
from moe_train.checkpoint.tools.export import DTYPES, export_weights
from moe_train.config.errors import UsageError
from tests.checkpoint.made import BUFFERS, CONFIG, SHAPES, made_state, make_checkpoint


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1, 60, 10**9])
def test_tensors_are_whole(tmp_path: Path, dtype: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (export, inspection):
        monkeypatch.setattr(module, "CHUNK", 4)
    manifest = read_manifest(make_checkpoint(tmp_path, world_size=4))
    folder = tmp_path / "deep" / "out"
    done = export_weights(manifest, folder, dtype, limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{done.shards:05d}.safetensors" for number in range(1, done.shards + 1)]
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", *files, "model.safetensors.index.json"]
    shards = {file: load_file(folder / file) for file in files}
    assert {name: file for file, held in shards.items() for name in held} == index["weight_map"]
    found = {name: tensor for held in shards.values() for name, tensor in held.items()}
    assert done.tensors == len(found) and found.keys() == {*SHAPES, *BUFFERS}
    assert done.bytes == index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for held in shards.values():
        sizes = [tensor.nbytes for tensor in held.values() if tensor.nbytes]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert (done.shards == 1) == (limit == 10**9)
    for name, shape in SHAPES.items():
        assert torch.equal(found[name], made_state()[f"weight/{name}"].view(shape).to(DTYPES[dtype])), name
    assert torch.equal(found["router.bias"], torch.tensor(BUFFERS["router.bias"]))
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"model": CONFIG["model"]}
    assert not folder.with_name("out.part").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    path = checkpoint / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DamagedCheckpoint, match="rank_00000"):
        export_weights(read_manifest(checkpoint), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["out", "out.part"])
def test_nothing_is_written_over(tmp_path: Path, name: str) -> None:
    manifest = read_manifest(make_checkpoint(tmp_path))
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="exists"):
        export_weights(manifest, tmp_path / "out")
    assert not any((tmp_path / name).iterdir())


def test_a_value_that_fp16_does_not_hold_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    state = made_state()
    state["weight/norm.weight"][1] = 1e5
    manifest = read_manifest(make_checkpoint(tmp_path, state=state))
    with pytest.raises(UsageError, match=r"--dtype \(fp16\): norm\.weight"):
        export_weights(manifest, tmp_path / "out", "fp16", 1)
    assert not list(tmp_path.glob("out*"))
    assert export_weights(manifest, tmp_path / "out", "bf16", 1).tensors == 5


def test_a_failure_to_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        export_weights(read_manifest(make_checkpoint(tmp_path)), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_remote_export_has_the_files_of_a_local_one(tmp_path: Path) -> None:
    manifest = read_manifest(make_checkpoint(tmp_path))
    filesystem = fsspec.filesystem("memory")
    local = export_weights(manifest, tmp_path / "out", "bf16", 60)
    remote = export_weights(manifest, "memory://exports/out", "bf16", 60)
    assert (remote.tensors, remote.bytes, remote.shards) == (local.tensors, local.bytes, local.shards)
    found = {path.rpartition("/")[2]: filesystem.cat(path) for path in filesystem.find("/exports/out")}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match=r"FOLDER .'memory://exports/out'. exists"):
        export_weights(manifest, "memory://exports/out")


def test_a_remote_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, sent = fsspec.filesystem("memory"), []

    def put_file(self: object, path: str, target: str) -> None:
        sent.append(target)
        if target.endswith("index.json"):
            raise OSError("the link is down")
        filesystem.pipe(target, Path(path).read_bytes())

    monkeypatch.setattr(type(filesystem), "put_file", put_file)
    with pytest.raises(UsageError, match=r"index.json cannot be written: OSError: the link is down"):
        export_weights(read_manifest(make_checkpoint(tmp_path)), "memory://exports/broken")
    assert len(sent) == 3 and not filesystem.find("/exports/broken")
