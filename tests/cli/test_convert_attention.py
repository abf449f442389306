"""`moe-train convert-attention`: what it prints, what a user gets wrong, and training that goes on from its output."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint.manifest import read_manifest
from moe_train.cli.main import main
from moe_train.config.load import read_yaml
from tests.interop.test_convert_attention import make_source
from tests.train.runs import SMALL, losses, train_forked


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A run's folder; its model has 4 heads of keys and values in all of 8 layers."""
    return make_source(tmp_path / "run").folder.parent.parent


def convert(source: Path, output: Path, *options: str) -> int:
    return main(["convert-attention", "--run", str(source), "--output", str(output), *options])


def test_what_it_says(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "a new", "--num-kv-heads", "2", "--kv-layers", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'a new'}: made from {source / 'checkpoints' / 'step_00000007'}"
    assert "key and value heads: 2, owned by layers 0, 2, 4, 6" in lines
    assert "KV cache of a token, in fp32: 1,024 -> 256 bytes" in lines
    assert lines[-2:] == ["uptrain it for 50 steps:", f"  moe-train train --config '{tmp_path / 'a new'}/config.yaml'"]


def test_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = source / "checkpoints" / "step_00000007"
    assert convert(checkpoint, tmp_path / "new", "--kv-layers", "0,4", "--steps", "9", "--json") == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert printed.err == "" and found["output"] == str(tmp_path / "new")
    assert found["checkpoint"] == str(tmp_path / "new" / "checkpoints" / "step_00000000")
    assert (found["num_kv_heads"], found["kv_layers"], found["steps"]) == (4, [0, 4], 9)
    assert found["kv_cache_bytes_per_token"] == {"before": 1024, "after": 256}
    assert found["parameters"]["before"] - found["parameters"]["after"] == 6 * 2 * 16 * 16
    assert read_manifest(Path(found["checkpoint"])).config["model"]["kv_layers"] == [0, 4]


def test_wider_mlps(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "new", "--kv-layers", "1", "--widen-mlp") == 0
    assert "inner widths: 28 dense, 12 of an expert" in capsys.readouterr().out.splitlines()


BAD = {
    "nothing asked for": ([], "--num-kv-heads, --kv-layers or both"),
    "nothing changes": (
        ["--num-kv-heads", "4", "--kv-layers", "8"],
        "num_kv_heads (4) and the number of kv_layers (8)",
    ),
    "more heads": (["--num-kv-heads", "8"], "--num-kv-heads (8) is larger than the source's num_kv_heads (4)"),
    "heads that do not divide": (
        ["--num-kv-heads", "3"],
        "--num-kv-heads (3) must divide the source's num_kv_heads (4)",
    ),
    "no head": (["--num-kv-heads", "0"], "--num-kv-heads (0) must be 1 or more"),
    "more layers": (["--kv-layers", "9"], "kv_layers (9) must not exceed num_layers (8)"),
    "no layer": (["--kv-layers", "0"], "kv_layers (0)"),
    "layers without the first": (["--kv-layers", "1,4"], "kv_layers ([1, 4]) must begin with layer 0"),
    "layers that are not there": (["--kv-layers", "0,8"], "kv_layers ([0, 8]) must be increasing layer numbers"),
    "layers that are no numbers": (["--kv-layers", "0,x"], "--kv-layers ('0,x') must be a number of layers"),
    "no step": (["--num-kv-heads", "1", "--steps", "0"], "--steps (0) must be 1 or more"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_usage_is_said_and_leaves_nothing(
    source: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_more_owner_layers_than_there_were_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "run", kv_layers=2).folder
    assert convert(source, tmp_path / "new", "--kv-layers", "0,2,4", "--num-kv-heads", "1") == 2
    assert "--kv-layers (0,2,4) are 3 layers, more than the source's 2" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["", ".", "..", "/"])
def test_an_output_without_a_name_is_refused(source: Path, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-attention", "--run", str(source), "--output", output, "--kv-layers", "1"]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "why"), [("new", "exists"), ("new.part", "under way or killed")])
def test_what_is_there_is_not_written_over(
    source: Path, tmp_path: Path, name: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    assert convert(source, tmp_path / "new", "--num-kv-heads", "1") == 2
    assert why in capsys.readouterr().err and (tmp_path / name).is_dir() and not list((tmp_path / name).iterdir())


def test_a_run_that_is_not_there_and_a_full_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path / "nowhere", tmp_path / "new", "--num-kv-heads", "1") == 2
    assert "--run" in capsys.readouterr().err

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_train.checkpoint.tensor_files.write_tensor_file", fail)
    assert convert(source, tmp_path / "new", "--num-kv-heads", "1") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_training_goes_on_from_what_it_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text" / "a.txt"
    text.parent.mkdir()
    text.write_text("".join(f"{number} and {number * number} are a number and its square\n" for number in range(2000)))
    data = ["--data.source=text", f'--data.paths=["{text}"]', f"--data.cache_dir={tmp_path / 'cache'}"]
    trained, output = tmp_path / "trained", tmp_path / "new"
    result = train_forked(1, *SMALL, *data, f"--train.run_dir={trained}", "--train.steps=2")
    assert result.returncode == 0, result
    assert convert(trained, output, "--num-kv-heads", "1", "--kv-layers", "1", "--steps", "2", "--widen-mlp") == 0
    result = train_forked(1, "--config", str(output / "config.yaml"))
    assert result.returncode == 0, result
    assert f"going on from {output / 'checkpoints' / 'step_00000000'}: 0 steps done, 2 to do" in result.stdout
    assert "changed since" not in result.stdout
    found = losses(output)
    assert sorted(found) == [1, 2] and all(math.isfinite(loss) for loss in found.values())
    manifest = read_manifest(output / "checkpoints" / "step_00000002")
    assert (
        manifest.consumed_sequences == 2 * read_manifest(trained / "checkpoints" / "step_00000002").consumed_sequences
    )
    model = read_yaml(output / "config.yaml")["model"]
    assert (model["num_kv_heads"], model["kv_layers"], model["num_layers"]) == (1, 1, 2)
