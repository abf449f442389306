"""Routers, balance terms, capacity and telemetry in real runs: the same figures in every layout, and after resuming."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint.manifest import encode_manifest, read_manifest
from moe_train.train.telemetry.records import EXPERT_FIGURES
from tests.train.runs import SMALL, records, train_forked

NUM_STEPS = 8
# Everything that is linear in tokens or sequences, so that the number of micro-steps makes no difference.
EVERYTHING = (
    *SMALL,
    "--model.moe.router=sigmoid_topk",
    "--model.moe.num_experts=8",
    "--model.moe.top_k=2",
    "--model.moe.num_groups=4",
    "--model.moe.top_k_groups=2",
    "--model.moe.routed_scaling_factor=1.5",
    "--model.moe.num_shared_experts=1",
    "--model.moe.input_jitter=0.05",
    "--model.moe.capacity_factor=1.0",
    "--model.moe.importance_cv2_coef=0",
    "--model.moe.load_cv2_coef=0",
    "--model.moe.switch_aux_coef=0.05",
    "--model.moe.switch_scope=sequence",
    "--model.moe.z_loss_coef=0.01",
    "--model.moe.bias_update_rate=0.01",
    '--model.moe.coef_schedules={"z_loss_coef": [[0, 1], [4, 0]], "bias_update_rate": [[0, 1], [6, 0.5]]}',
    "--optim.learning_rate=3e-3",
    "--train.global_batch_size=8",
    f"--train.steps={NUM_STEPS}",
    "--train.sample_tokens=0",
    "--data.validation_fraction=0",
    "--checkpoint.every=5",
    "--telemetry.every=3",  # a checkpoint in the middle of a window
    "--telemetry.tensorboard=false",
)


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    micro_batch_size: int
    recompute: str

    @property
    def options(self) -> list[str]:
        return [
            f"--parallel.expert_parallel_size={self.expert_parallel_size}",
            f"--parallel.zero_stage={self.zero_stage}",
            f"--train.micro_batch_size={self.micro_batch_size}",
            f"--train.recompute={self.recompute}",
        ]


LAYOUTS = (
    Layout(1, 1, 1, 8, recompute="none"),
    Layout(1, 1, 1, 2, recompute="block"),
    Layout(2, 2, 2, 2, recompute="none"),
    Layout(4, 2, 3, 1, recompute="experts"),
)


def train_in(layout: Layout, *arguments: str) -> None:
    """A run in a layout."""
    result = train_forked(layout.world_size, *EVERYTHING, *layout.options, *arguments)
    assert result.returncode == 0, result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same training in every layout."""
    folders = []
    for layout in LAYOUTS:
        folders.append(tmp_path_factory.mktemp("layout"))
        train_in(layout, f"--train.run_dir={folders[-1]}")
    return folders


def biases(run_dir: Path, step: int) -> dict[str, list[float]]:
    return read_manifest(run_dir / "checkpoints" / f"step_{step:08d}").buffers


@pytest.mark.parametrize("index", range(1, len(LAYOUTS)))
def test_figures_are_the_same(runs: list[Path], index: int) -> None:
    ours, reference = records(runs[index]), records(runs[0])
    assert [line["step"] for line in ours] == [line["step"] for line in reference] == [3, 6, 8]
    assert [line["moe/steps"] for line in ours] == [3, 3, 2]
    for here, there in zip(ours, reference):
        # fp32 sums in another order; the tokens that a rounding sends elsewhere are few, and none here.
        assert here["train/loss"] == pytest.approx(there["train/loss"], rel=1e-4)
        assert here["moe/counts/layer_01"] == pytest.approx(there["moe/counts/layer_01"], abs=2)
        assert sum(here["moe/counts/layer_01"]) == here["moe/steps"] * 8 * 32 * 2
        executed = sum(here["moe/rank_rows/layer_01"])
        assert executed == round((1 - here["moe/dropped_fraction"]) * sum(here["moe/counts/layer_01"]))
        assert len(here["moe/rank_rows/layer_01"]) == LAYOUTS[index].world_size
        for name in EXPERT_FIGURES:
            if name != "moe/rank_overload":  # it is about ranks
                assert here[name] == pytest.approx(there[name], rel=2e-3, abs=1e-6), name
                assert here[f"{name}/layer_01"] == here[name]
    assert reference[-1]["moe/dropped_fraction"] > 0.01
    assert biases(runs[index], NUM_STEPS) == biases(runs[0], NUM_STEPS)


def test_traffic_is_what_crosses(runs: list[Path]) -> None:
    alone, spread = records(runs[0])[0], records(runs[2])[0]
    assert alone["moe/all_to_all_bytes"] == alone["moe/all_to_all_ms"] == alone["moe/all_to_all_fraction"] == 0
    # Rows of 32 fp32 there and back, in the forward and the backward pass; about half stay on their rank.
    rows = sum(spread["moe/rank_rows/layer_01"]) / spread["moe/steps"]
    assert 0.3 * 4 * rows * 32 * 4 < spread["moe/all_to_all_bytes"] < 0.7 * 4 * rows * 32 * 4
    assert spread["moe/all_to_all_ms"] > 0 and 0 < spread["moe/all_to_all_fraction"] < 1
    assert spread["moe/rank_overload"] >= 1


def test_the_bias_moved_by_its_schedule(runs: list[Path]) -> None:
    ((name, values),) = biases(runs[0], NUM_STEPS).items()
    assert name == "blocks.1.feed_forward.router.selection_bias" and len(values) == 8
    rates = [0.01 * (1 - 0.5 * min(step, 6) / 6) for step in range(NUM_STEPS)]
    # Each is a sum of the rates with signs (an expert at the mean to the token stays): one of 3^8 values.
    possible = {0.0}
    for rate in rates:
        possible = {round(value + sign * rate, 9) for value in possible for sign in (-1, 0, 1)}
    for value in values:
        assert min(abs(value - other) for other in possible) < 1e-7, value
    assert max(map(abs, values)) > 0.01


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(0, 0), (0, 2), (3, 1)])
def test_a_run_goes_on_as_if_it_had_not_stopped(
    runs: list[Path], tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[saved_by], folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{NUM_STEPS:08d}")
    train_in(LAYOUTS[loaded_by], f"--train.run_dir={folder}")
    continued, uninterrupted = records(folder), records(runs[saved_by])
    # Step 5 was saved in the middle of a window, which begins anew.
    assert [(line["step"], line["moe/steps"]) for line in continued] == [(3, 3), (6, 1), (8, 2)]
    close: dict[str, Any] = {"rel": 1e-4 if saved_by != loaded_by else 1e-6}
    for here, there in zip(continued, uninterrupted):
        assert here["train/loss"] == pytest.approx(there["train/loss"], **close)
    assert continued[-1]["moe/counts/layer_01"] == pytest.approx(uninterrupted[-1]["moe/counts/layer_01"], abs=2)
    assert biases(folder, NUM_STEPS) == biases(runs[saved_by], NUM_STEPS)


def test_a_bias_of_another_length_is_refused(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    path = folder / "checkpoints" / f"step_{NUM_STEPS:08d}" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["buffers"] = {name: values[:-1] for name, values in manifest["buffers"].items()}
    del manifest["digest"]
    path.write_text(encode_manifest(manifest))
    result = train_forked(1, *EVERYTHING, *LAYOUTS[0].options, f"--train.run_dir={folder}", "--train.steps=9")
    assert result.returncode == 2 and "selection_bias has 7 values" in result.stderr, result


def test_a_learned_bias_is_not_thrown_away(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    options = [option for option in EVERYTHING if "coef_schedules" not in option]
    frozen = [*options, *LAYOUTS[0].options, f"--train.run_dir={folder}", f"--train.steps={NUM_STEPS + 1}"]
    result = train_forked(1, *frozen, "--model.moe.bias_update_rate=0")
    assert result.returncode == 2 and "bias_update_rate" in result.stderr and "held still" in result.stderr, result
    result = train_forked(1, *frozen, '--model.moe.coef_schedules={"bias_update_rate": [[0, 0]]}')
    assert result.returncode == 0, result
    assert biases(folder, NUM_STEPS + 1) == biases(runs[0], NUM_STEPS)


def test_a_bias_stays_wide_in_a_narrow_run(tmp_path: Path) -> None:
    """In bf16 a bias of a half could not take a step of a thousandth."""
    unscheduled = [option for option in EVERYTHING if "coef_schedules" not in option]
    options = [*unscheduled, *LAYOUTS[0].options, f"--train.run_dir={tmp_path}", "--train.precision=bf16"]
    result = train_forked(1, *options, "--model.moe.bias_update_rate=0.001")
    assert result.returncode == 0, result
    ((_, values),) = biases(tmp_path, NUM_STEPS).items()
    for value in values:  # sums of eight steps of +-0.001 in fp32, where bf16 has three digits
        assert abs(value / 0.001 - round(value / 0.001)) < 1e-4, values
    assert any(values)


@pytest.mark.parametrize(
    "options",
    [
        ("--model.moe.router=switch", "--model.moe.top_k=1", "--model.moe.switch_aux_coef=0.01"),
        ("--model.moe.router=softmax_topk", "--model.moe.bias_update_rate=0.001", "--model.moe.z_loss_coef=0.001"),
        (
            "--model.moe.router=noisy_topk",
            "--model.moe.importance_cv2_coef=0.1",
            "--model.moe.load_cv2_coef=0.1",
            "--model.moe.bias_update_rate=0.001",
            "--model.moe.capacity_factor=1.0",
            "--model.moe.eval_capacity_factor=1.0",
            "--model.moe.drop_policy=position",
        ),
    ],
)
def test_other_combinations_learn(tmp_path: Path, options: tuple[str, ...]) -> None:
    base = [*SMALL, "--model.moe.num_experts=8", "--model.moe.importance_cv2_coef=0", "--model.moe.load_cv2_coef=0"]
    result = train_forked(
        1, *base, "--train.steps=12", "--optim.learning_rate=1e-2", f"--train.run_dir={tmp_path}", *options
    )
    assert result.returncode == 0, result
    lines = records(tmp_path)
    assert lines[-1]["train/cross_entropy"] < lines[0]["train/cross_entropy"] - 0.1
