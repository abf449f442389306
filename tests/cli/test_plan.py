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


def zero(name: str, value: object) -> str:
    return f"--deepspeed={json.dumps({'zero_optimization': {name: value}})}"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, *CONFIG, *CLUSTER)
    assert found["parameters"] == {"total": 46_702_792_704, "active": 12_879_925_248}
    assert set(found["traffic"]) == {"intra_node", "inter_node"}
    assert sum(found["memory"].values()) == pytest.approx(found["memory_total"], abs=10)
    step = found["step"]
    assert step["seconds"] == pytest.approx(sum(step["terms"].values()))
    assert step["largest_term"] in step["terms"] and step["p50"] <= step["p99"]
    assert 0 < found["mfu"] < 1 and found["fits"] is True


def test_offload_in_json_and_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*CONFIG, *CLUSTER, "--parallel.offload_optimizer=cpu"]
    found = plan_json(capsys, *given)
    assert found["layout"]["offload_optimizer"] == "cpu" and found["memory"]["optimizer_states"] == 0
    assert sum(found["host_memory"].values()) == pytest.approx(found["host_memory_total"], abs=10)
    assert 0 < found["host_memory_total"] < found["host_memory_capacity"] == 2e12 / 8
    assert main(["plan", *given]) == 0
    text = capsys.readouterr().out
    assert ", offload\n" in text and "GiB a node" in text and "host copies" in text


def test_what_does_not_fit_is_said_with_the_largest_part(capsys: pytest.CaptureFixture[str]) -> None:
    single = [*CONFIG, "--device", "a100", "--parallel.expert_parallel_size=1", "--parallel.zero_stage=1"]
    assert main(["plan", *single]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit: over by" in text and "largest part optimizer states" in text
    assert plan_json(capsys, *single)["fits"] is False


def test_thousands_of_gpus_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    found = plan_json(
        capsys, *CONFIG, "--nodes=512", "--gpus-per-node=8", "--device=h200", "--train.global_batch_size=32768"
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
    captured = capsys.readouterr()
    assert "fits: the smallest takes" in captured.err and captured.out == ""
    assert main(["plan", *CONFIG, "--device", "h100", "--search", "--json"]) == 1
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["fits"] is False and found["tried"] > 10
    smallest = found["smallest"]
    assert smallest["memory_total"] > smallest["memory_capacity"]
    assert sum(smallest["memory"].values()) == pytest.approx(smallest["memory_total"], abs=10)


def test_settings_of_deepspeed_that_are_not_planned_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    zero = {"reduce_bucket_size": 1000, "overlap_comm": True, "stage3_max_live_parameters": 7}
    given = [*CONFIG, *CLUSTER, f"--deepspeed={json.dumps({'zero_optimization': zero})}"]
    names = [f"deepspeed.zero_optimization.{name}" for name in ("overlap_comm", "stage3_max_live_parameters")]
    assert plan_json(capsys, *given)["not_planned"] == names
    assert main(["plan", *given]) == 0
    text = capsys.readouterr().out
    assert all(f"{name} is not planned" in text for name in names)
    assert plan_json(capsys, *CONFIG, *CLUSTER)["not_planned"] == []


def test_more_ranks_a_node_than_were_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, product = tmp_path / "machine.json", {"rows": 64, "width": 64, "flops_per_second": 1e12}
    machine = DEVICES["a100"].model_dump(mode="json") | {"products": {"bf16": [product]}, "ranks_per_node": 4}
    file.write_text(json.dumps(machine))
    given = [*CONFIG, "--nodes", "4", "--device", str(file), "--gpus-per-node"]
    [warning] = plan_json(capsys, *given, "8")["warnings"]
    assert "--gpus-per-node (8)" in warning and "measured with 4 a node" in warning
    assert plan_json(capsys, *given, "4", "--parallel.expert_parallel_size=4")["warnings"] == []


def test_a_machine_out_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({"machine": DEVICES["a100"].model_dump(mode="json")}))
    options = [*CONFIG, "--nodes", "4", "--gpus-per-node", "8", "--device"]
    assert plan_json(capsys, *options, str(file)) == plan_json(capsys, *options, "a100")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("15e12", 15 * 10**12), ("2T", 2 * 10**12), ("100B", 10**11), ("1.5b", 15 * 10**8), ("500M", 5 * 10**8)]
    + [("3k", 3000), ("1_000_000", 10**6), ("4097", 4097)],
)
def test_tokens_of_a_run(text: str, tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, *CONFIG, *CLUSTER, "--tokens", text)
    run, step = found["run"], found["step"]
    in_a_step = 1024 * 4096
    assert run["tokens"] == tokens and (run["steps"] - 1) * in_a_step < tokens <= run["steps"] * in_a_step
    assert run["hours"] == pytest.approx(run["steps"] * step["seconds"] / 3600)
    assert run["gpu_hours"] == pytest.approx(32 * run["hours"])
    assert run["tokens_per_second"] == step["tokens_per_second"]
    assert run["checkpoint_bytes"] == 12 * found["parameters"]["total"]  # fp32 weights and two moments


@pytest.mark.slow  # a whole search
def test_a_run_is_shown_and_planned_for_what_a_search_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *CONFIG, *CLUSTER, "--tokens", "2T"]) == 0
    text = capsys.readouterr().out
    assert "2,000,000,000,000 tokens in 476,838 steps" in text and "checkpoints 560 GB each; 2 are kept" in text
    found = plan_json(capsys, *CONFIG, *CLUSTER, "--search", "--tokens", "2T")
    assert found["run"]["hours"] == pytest.approx(476_838 * found["step"]["seconds"] / 3600)


def test_two_layouts_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"parallel.zero_stage": 2, "train.micro_batch_size": 4}
    words = [f"{name}={value}" for name, value in changes.items()]
    found = plan_json(capsys, *CONFIG, *CLUSTER, "--tokens=1T", "--compare", *words)
    assert found["first"] == plan_json(capsys, *CONFIG, *CLUSTER, "--tokens=1T")
    assert found["second"] == plan_json(capsys, *CONFIG, *CLUSTER, "--tokens=1T", *(f"--{word}" for word in words))
    assert {name: found["changes"][name][1] for name in changes} == changes
    first, second, ratio = found["first"], found["second"], found["ratio"]
    assert ratio["memory_total"] == second["memory_total"] / first["memory_total"]
    assert ratio["traffic"]["inter_node"] == second["traffic"]["inter_node"] / first["traffic"]["inter_node"]
    assert ratio["step"]["tokens_per_second"] == pytest.approx(1 / ratio["step"]["seconds"])
    assert ratio["run"]["gpu_hours"] == pytest.approx(ratio["step"]["seconds"])
    assert ratio["memory"]["kv_cache"] is None  # nothing in both


def test_a_comparison_is_shown_with_its_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *CONFIG, *CLUSTER, "--tokens=1T", "--compare", "parallel.zero_stage=1"]) == 0
    text = capsys.readouterr().out
    assert "parallel.zero_stage: 3 -> 1" in text and "memory of a rank" in text and "GPU-hours" in text
    assert "first       fits" in text and "second      does not fit" in text


def test_another_file_is_compared_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    other = str(ROOT / "configs" / "deepseek_moe_16b.yaml")
    found = plan_json(capsys, *CONFIG, *CLUSTER, "--compare", other, "parallel.zero_stage=2")
    alone = plan_json(capsys, "--config", other, *CLUSTER, "--parallel.zero_stage=2")
    assert found["second"] == alone and found["first"] == plan_json(capsys, *CONFIG, *CLUSTER)


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
        ([*CONFIG, "--device", "h100", "--decode", "1"], "--decode: expected 2 arguments"),
        ([*CONFIG, "--device", "h100", "--gpus-per-node", "9"], "--gpus-per-node (9): a node of NVIDIA H100"),
        ([*CONFIG, "--device", "h100", "--inter-node-gbps", "9"], "--inter-node-gbps (9) has no effect with --nodes"),
        ([*CONFIG, *CLUSTER, "--tokens", "2X"], "--tokens ('2X') must be a whole number of tokens"),
        ([*CONFIG, *CLUSTER, "--tokens", "0"], "--tokens ('0') must be a whole number of tokens"),
        ([*CONFIG, *CLUSTER, "--tokens", "1.0001k"], "--tokens ('1.0001k') must be a whole number of tokens"),
        ([*CONFIG, *CLUSTER, "--tokens", "infT"], "--tokens ('infT') must be a whole number of tokens"),
        ([*CONFIG, *CLUSTER, "--search", "--compare", "a.b=1"], "--compare has no effect with --search"),
        ([*CONFIG, *CLUSTER, "--compare", "parallel.zero=1"], "unknown option --parallel.zero (value '1')"),
        ([*CONFIG, *CLUSTER, "--compare", "parallel.zero_stage=5"], "--compare: parallel.zero_stage (5)"),
        ([*CONFIG, *CLUSTER, "--compare", "train.global_batch_size=7"], "--compare: train.global_batch_size (7)"),
        ([*CONFIG, *CLUSTER, "--compare", "nowhere.yaml"], "nowhere.yaml"),
        ([*CONFIG, *CLUSTER, "--parallel.device=cpu"], "parallel.device (cpu) contradicts the machine"),
        (
            [*CONFIG, *CLUSTER, "--imbalance", "1.8"],
            "--imbalance (1.8) must be below sqrt(num_experts / top_k - 1) (1.73)",
        ),
        ([*CONFIG, *CLUSTER, zero("reduce_bucket_size", "abc")], "reduce_bucket_size ('abc') must be a whole number"),
        ([*CONFIG, *CLUSTER, zero("reduce_bucket_size", None)], "reduce_bucket_size (None) must be a whole number"),
        ([*CONFIG, *CLUSTER, zero("reduce_bucket_size", -5)], "reduce_bucket_size (-5) must be a whole number"),
        (
            [*CONFIG, *CLUSTER, zero("offload_param", {"device": "cpu"})],
            "offload_param ({'device': 'cpu'}) is not planned",
        ),
        (
            [*CONFIG, *CLUSTER, zero("offload_optimizer", {"device": "cpu"})],
            "offload_optimizer ({'device': 'cpu'}) has its home in parallel.offload_optimizer",
        ),
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
