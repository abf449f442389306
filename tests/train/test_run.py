"""What a run leaves: files, names, numbers; and that the same command goes on."""

import json
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.config.load import validate_config
from tests.processes import ProcessResult
from tests.train.runs import SMALL, losses, records, train_alone, train_forked

NAMES = (
    "train/loss",
    "train/cross_entropy",
    "train/lr",
    "train/grad_norm",
    "train/tokens",
    "moe/importance_cv2",
    "moe/load_cv2",
    "moe/max_violation",
    "perf/tokens_per_second",
    "perf/step_ms",
    "perf/tflops",
    "perf/mfu",
)


def test_the_folder_holds_what_it_should(quick_run: tuple[Path, ProcessResult]) -> None:
    folder, _ = quick_run
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json", "logs"):
        assert (folder / name).exists(), name
    assert sorted(p.name for p in (folder / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000004", "step_00000006"]  # keep_last is 2


def test_one_record_a_step_with_every_name(quick_run: tuple[Path, ProcessResult]) -> None:
    lines = records(quick_run[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(NAMES) <= line.keys()
        assert len(line["moe/counts/layer_01"]) == 4
        # 8 sequences of 32 tokens, 2 experts each, over both ranks and micro-steps
        assert sum(line["moe/counts/layer_01"]) == 8 * 32 * 2
        assert line["train/loss"] >= line["train/cross_entropy"]
    validated = [line for line in lines if "val/bits_per_byte" in line]
    assert [line["step"] for line in validated] == [3, 6] and all("val/cross_entropy" in line for line in validated)
    assert lines[-1]["train/tokens"] == 6 * 8 * 32
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_tensorboard_has_the_same_names_and_values(quick_run: tuple[Path, ProcessResult]) -> None:
    folder, _ = quick_run
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for line in records(folder):
        for name, value in line.items():
            if isinstance(value, float) and name in (*NAMES, "val/bits_per_byte"):
                shown = {event.step: event.value for event in board.Scalars(name)}[line["step"]]
                assert abs(shown - value) <= 1e-6 * max(1.0, abs(value))  # TensorBoard keeps fp32


def test_the_resolved_configuration_loads_again(quick_run: tuple[Path, ProcessResult]) -> None:
    config = validate_config(yaml.safe_load((quick_run[0] / "config.yaml").read_text()))
    assert config.parallel.expert_parallel_size == 2
    assert config.train.precision == "fp32"
    assert config.model.vocab_size == 300


def test_the_screen_shows_our_lines_alone(quick_run: tuple[Path, ProcessResult]) -> None:
    _, result = quick_run
    assert result.stderr.count("\n") <= 4, result.stderr  # the cache may have been built, and says so
    assert "step      6/6" in result.stdout and "MaxVio" in result.stdout
    for words in ("gzip -9", "xz -9", "no dead expert", "tensorboard --logdir", "tokens/s", "A text drawn"):
        assert words in result.stdout, words
    for noise in ("[INFO]", "Warning", "DeepSpeed info"):
        assert noise not in result.stdout, noise


def test_the_summary_is_plain_numbers(quick_run: tuple[Path, ProcessResult]) -> None:
    folder, _ = quick_run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["world_size"] == 2 and summary["expert_parallel_size"] == 2
    assert summary["val/bits_per_byte"] == records(folder)[-1]["val/bits_per_byte"]
    assert set(summary["reference_bits_per_byte"]) == {"gzip -9", "xz -9"}
    assert summary["parameters"]["active"] < summary["parameters"]["total"]
    assert sum(summary["moe/counts"]["layer_01"]) == 6 * 8 * 32 * 2


@pytest.mark.slow
def test_documents_isolated_post_norm_layernorm_recomputed_and_mlkv_train(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        "--model.isolate_documents=true",
        "--model.norm=layernorm",
        "--model.norm_position=post",
        "--model.kv_layers=1",
        "--model.tie_embeddings=true",
        "--train.recompute=block",
        "--train.precision=bf16",
        "--parallel.zero_stage=3",
        "--train.steps=16",
        "--optim.learning_rate=1e-2",
        f"--train.run_dir={tmp_path}",
    ]
    result = train_forked(1, *arguments)
    assert result.returncode == 0, result
    lines = records(tmp_path)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.1


def test_the_same_command_goes_on_and_a_longer_run_continues(tmp_path: Path) -> None:
    base = [*SMALL, f"--train.run_dir={tmp_path}", "--train.sample_tokens=0"]
    assert train_forked(1, *base, "--train.steps=3").returncode == 0
    first = records(tmp_path)
    result = train_alone(*base, "--train.steps=5")
    assert result.returncode == 0, result
    assert "going on from" in result.stdout and "3 steps done, 2 to do" in result.stdout
    assert records(tmp_path)[:2] == first[:2]
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4, 5]
    again = train_forked(1, *base, "--train.steps=5")
    assert again.returncode == 0 and "0 to do" in again.stdout
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4, 5]


def test_time_causes_saves_too(tmp_path: Path) -> None:
    """A save after every minute, here of a few milliseconds: whole checkpoints, and the same losses as without."""
    options = [*SMALL, "--train.steps=30", "--checkpoint.keep_last=99"]
    saved, unsaved = tmp_path / "saved", tmp_path / "unsaved"
    result = train_forked(2, *options, "--checkpoint.every_minutes=0.001", f"--train.run_dir={saved}")
    assert result.returncode == 0, result
    result = train_forked(2, *options, "--checkpoint.every_minutes=0", f"--train.run_dir={unsaved}")
    assert result.returncode == 0, result
    steps = [read_manifest(folder).step for folder in list_checkpoints(saved / "checkpoints")]
    assert len(steps) >= 3 and steps[-1] == 30
    assert [read_manifest(folder).step for folder in list_checkpoints(unsaved / "checkpoints")] == [30]
    assert losses(saved) == losses(unsaved)
