"""Every configuration of a large model trains: a copy with small sizes and its own options."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_train.config.load import read_yaml
from tests.train.runs import ROOT, losses, train_forked

FILES = [
    path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem != "quickstart"
]  # other runs are of it
SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "kv_layers": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_layers": [1, 2, 3],
    "moe": {"num_experts": 8, "top_k": 3, "intermediate_size": 16},
}


def small_options(values: dict[str, Any], folder: Path) -> list[str]:
    """What makes a file's own sizes small, and gives it something to read; all else stays as it is in the file."""
    model, moe = values["model"], values["model"]["moe"]
    sizes = {f"model.{name}": size for name, size in SIZES.items() if name in model and name != "moe"}
    sizes |= {f"model.moe.{name}": size for name, size in SIZES["moe"].items() if name in moe}
    sizes |= {"data.source": "text", "data.tokenizer": "bytes", "data.cache_dir": folder / "cache"}
    sizes |= {"data.paths": json.dumps([str(folder / "train.txt")])}
    sizes |= {"data.validation_paths": json.dumps([str(folder / "held_out.txt")])}
    sizes |= {"parallel.expert_parallel_size": 1, "train.steps": 2, "train.global_batch_size": 8}
    sizes |= {"train.sequence_length": 32, "train.sample_tokens": 4, "telemetry.every": 1}
    sizes |= {"train.run_dir": folder / "run"}
    return [f"--{name}={value}" for name, value in sizes.items()]


def by_time(path: Path):
    """128 experts take long."""
    return pytest.param(path, id=path.stem, marks=pytest.mark.slow if "qwen3" in path.stem else ())


@pytest.mark.parametrize("path", [by_time(path) for path in FILES])
def test_a_small_copy_trains(tmp_path: Path, path: Path) -> None:
    for name, numbers in (("train", range(300)), ("held_out", range(300, 330))):
        lines = "".join(f"{number} and {number * number} are a number and its square\n" for number in numbers)
        (tmp_path / f"{name}.txt").write_text(lines)
    values = read_yaml(path)
    options = small_options(values, tmp_path)
    result = train_forked(1, f"--config={path}", *options)
    assert result.returncode == 0, result
    found = losses(tmp_path / "run")
    assert sorted(found) == [1, 2] and all(math.isfinite(loss) for loss in found.values())
    kept = read_yaml(tmp_path / "run" / "config.yaml")
    for section in ("model", "optim", "parallel"):  # the options of the file, not others, were trained with
        for name, value in values[section].items():
            if name not in SIZES and name != "expert_parallel_size":
                assert kept[section][name] == value, (section, name)
    for name, value in values["model"]["moe"].items():
        if name not in SIZES["moe"] and name != "coef_schedules":
            assert kept["model"]["moe"][name] == value, name
