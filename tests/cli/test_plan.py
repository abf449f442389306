"""`moe-train plan` as a user calls it: the JSON's keys, verdicts, errors of one message, thousands of GPUs."""

import json
import time
from pathlib import Path

import pytest
import yaml

from moe_train.cli.main import main
from moe_train.plan.devices import DEVICES
from tests.plan.cases import ROOT

CONFIG = ["--config", str(ROOT / "configs" / "mixtral_8x7b.yaml")]
CLUSTER = ["--nodes", "4", "--gpus-per-node", "8", "--device", "h100"]


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, *CONFIG, *CLUSTER)
    assert found["parameters"] == {"total": 46_702_792_704, "active": 12_879_925_248}
    assert set(found["traffic"]) == {"intra_node", "inter_node"}
    assert sum(found["memory"].values()) == pytest.approx(found["memory_total"], abs=10)
    step = found["step"]
    assert step["seconds"] == pytest.approx(sum(step["terms"].values()))
    assert step["largest_term"] in step["terms"] and step["p50"] <= step["p99"]
    assert 0 < found["mfu"] < 1 and found["fits"] is True


def test_what_does_not_fit_is_said_with_the_largest_part(capsys: pytest.CaptureFixture[str]) -> None:
    single = [*CONFIG, "--device", "a100", "--parallel.expert_parallel_size=1", "--parallel.zero_stage=1"]
    assert main(["plan", *single]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit: over by" in text and "largest part optimizer states" in text
    assert plan_json(capsys, *single)["fits"] is False


def test_thousands_of_gpus_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    found = plan_json(
        capsys, *CONFIG, "--nodes=512", "--gpus-per-node=8", "--device=h200", "--train.global_batch_size=8192"
    )
    assert found["layout"]["world_size"] == 4096
    assert time.process_time() - began < 5  # of a core: other processes may have the others


def test_search_writes_a_configuration_that_plans_alike(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "best.yaml"
    found = plan_json(capsys, *CONFIG, *CLUSTER, "--search", "--output", str(output))
    again = plan_json(capsys, "--config", str(output), *CLUSTER)
    assert again["step"]["seconds"] == pytest.approx(found["step"]["seconds"]) and again["layout"] == found["layout"]
    assert yaml.safe_load(output.read_text())["train"]["global_batch_size"] == 1024


def test_search_that_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *CONFIG, "--device", "h100", "--search"]) == 1
    assert "fits: the smallest takes" in capsys.readouterr().err


def test_a_machine_out_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({"machine": DEVICES["a100"].model_dump(mode="json")}))
    options = [*CONFIG, "--nodes", "4", "--gpus-per-node", "8", "--device"]
    assert plan_json(capsys, *options, str(file)) == plan_json(capsys, *options, "a100")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*CONFIG], "--device is missing"),
        ([*CONFIG, "--device", "h101"], "--device ('h101') must be one of h100, h200, a100, mi300x"),
        ([*CONFIG, "--device", "h100", "--nodes", "0"], "--nodes (0) must be 1 or more"),
        ([*CONFIG, "--device", "h100", "--nodes", "two"], "--nodes ('two') must be a whole number"),
        ([*CONFIG, "--device", "h100", "--nodes", "3"], "world size (3) must be divisible"),
        ([*CONFIG, "--device", "h100", "--imbalance", "-1"], "--imbalance (-1) must be 0 or more"),
        ([*CONFIG, "--device", "h100", "--output", "x"], "--output (x) has no effect without --search"),
        ([*CONFIG, "--device", "h100", "--loads", "nowhere"], "--loads ('nowhere')"),
        (["--config", "nowhere.yaml", "--device", "h100"], "nowhere.yaml"),
    ],
)
def test_errors_are_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and len(captured.err.strip().splitlines()) == 1


def test_a_file_that_is_no_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text("name: x\n")
    assert main(["plan", *CONFIG, "--device", str(file)]) == 2
    assert str(file) in capsys.readouterr().err
