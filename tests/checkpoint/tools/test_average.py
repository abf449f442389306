"""Averages of checkpoints: the mean of every weight and buffer, in any layout, and a run that goes on from it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.tools.average import average_checkpoints
from moe_train.cli.main import main
from tests.train.runs import SMALL, losses, train_forked

BASE = (*SMALL, "--telemetry.tensorboard=false", "--train.sample_tokens=0", "--train.global_batch_size=4")
BASE += ("--model.moe.bias_update_rate=0.01", "--checkpoint.every=2", "--checkpoint.keep_last=10")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    layout = ("--parallel.expert_parallel_size=2", "--parallel.zero_stage=3")
    result = train_forked(2, *BASE, *layout, "--train.steps=6", f"--train.run_dir={folder}")
    assert result.returncode == 0, result
    return folder


@pytest.mark.parametrize("file_elements", [1000, 1 << 20])
def test_every_weight_is_the_mean(run_dir: Path, tmp_path: Path, file_elements: int) -> None:
    manifests = [read_manifest(folder) for folder in list_checkpoints(run_dir / "checkpoints")]
    done = read_manifest(average_checkpoints(manifests, tmp_path / "mean", file_elements=file_elements))
    assert done.step == 6 and done.optimizer_step == 0 and done.kinds_of("head.weight") == ("weight",)
    for name, shape in done.shapes.items():
        end = torch.Size(shape).numel()
        found = []
        for manifest in (*manifests, done):
            with RangeReader(manifest) as reader:
                found.append(reader.read(name, "weight", 0, end).double())
        torch.testing.assert_close(found[-1], torch.stack(found[:-1]).mean(0), rtol=1e-6, atol=1e-9)
    for name, values in done.buffers.items():
        expected = torch.tensor([manifest.buffers[name] for manifest in manifests]).double().mean(0)
        torch.testing.assert_close(torch.tensor(values).double(), expected, rtol=1e-6, atol=1e-9)


def test_the_command_and_a_run_that_goes_on(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "mean"
    assert main(["checkpoint", "average", str(run_dir), "--last", "3", "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["averaged"]) == 3 and found["checkpoint"].endswith("step_00000006")
    assert main(["checkpoint", "verify", str(output)]) == 0
    result = train_forked(1, *BASE, "--train.steps=8", f"--train.run_dir={output}")
    assert result.returncode == 0 and "6 steps done, 2 to do" in result.stdout, result
    assert sorted(losses(output)) == [7, 8]
    assert read_manifest(list_checkpoints(output / "checkpoints")[-1]).optimizer_step == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "--last", "9", "--output", "NEW"], ["--last (9)", "3 checkpoints"]),
        (["RUN", "--last", "1", "--output", "NEW"], ["at least two"]),
        (["RUN", "--output", "NEW"], ["at least two"]),
        (["RUN", "--last", "2", "--output", "RUN"], ["--output", "exists"]),
        (["RUN", "RUN", "--last", "2", "--output", "NEW"], ["--last (2)", "one folder"]),
    ],
)
def test_what_cannot_be_is_refused(
    run_dir: Path, tmp_path: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture
) -> None:
    places = {"RUN": str(run_dir), "NEW": str(tmp_path / "new")}
    assert main(["checkpoint", "average", *(places.get(word, word) for word in arguments)]) == 2
    errors = capsys.readouterr().err
    assert all(word in errors for word in words), errors
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.part").exists()


def test_damage_is_found_and_nothing_is_left(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    folders = list_checkpoints(copy / "checkpoints")
    file = next(folders[0].glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    code = main(["checkpoint", "average", *map(str, folders), "--output", str(tmp_path / "new")])
    assert code == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
