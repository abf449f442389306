"""Runs in which something goes wrong: bad numbers, a hang, a kill in the middle of a save, signals. Real processes."""

import json
import signal
import time
from pathlib import Path

import pytest

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.launch.fork_server import wait_for_all
from tests.train.faults import start_faulty, train_faulty
from tests.train.runs import SMALL, losses, records, start_forked, train_forked

NAN = float("nan")
# Two ranks, 4 sequences a step.
BASE = (*SMALL, "--train.sample_tokens=0", "--data.validation_fraction=0", "--telemetry.tensorboard=false")


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_step_with_a_bad_number_on_one_rank_is_skipped_on_all(tmp_path: Path, zero_stage: int) -> None:
    # Sequence 8 is the first of step 2 (from 0), and rank 0's.
    options = [*BASE, f"--train.run_dir={tmp_path}", "--train.steps=5", f"--parallel.zero_stage={zero_stage}"]
    results = train_faulty(2, {"poison": [[8, 8, NAN]]}, *options)
    assert [result.returncode for result in results] == [0, 0], results
    assert "step      3  skipped: the loss of rank 0 is not finite" in results[0].stdout
    lines = records(tmp_path)
    assert [line["train/skipped"] for line in lines] == [0, 0, 1, 0, 0]
    assert lines[2]["train/loss"] is None and lines[3]["train/loss"] > 0
    manifest = read_manifest(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert manifest.step == 5 and manifest.optimizer_step == 4
    assert manifest.step_control.skipped_steps == 1 and len(manifest.step_control.grad_norms) == 4


def test_a_gradient_far_over_the_median_is_skipped_and_clipping_is_not_enough(tmp_path: Path) -> None:
    options = [*BASE, f"--train.run_dir={tmp_path}", "--train.steps=38", "--train.max_grad_norm_ratio=20"]
    results = train_faulty(1, {"poison": [[70, 71, 1e4]]}, *options)  # 2 sequences a step: step 35
    assert results[0].returncode == 0, results
    assert [line["step"] for line in records(tmp_path) if line["train/skipped"]] == [36]
    assert "step     36  skipped: the gradient norm (" in results[0].stdout
    assert "times the median of the last steps" in results[0].stdout


def test_a_run_of_bad_numbers_goes_back_and_passes_over_the_data(tmp_path: Path) -> None:
    options = [*BASE, f"--train.run_dir={tmp_path}", "--train.steps=12", "--checkpoint.every=4"]
    options.append("--train.max_skipped_steps=3")
    results = train_faulty(2, {"poison": [[24, 35, NAN]]}, *options)  # steps 6, 7 and 8
    assert [result.returncode for result in results] == [0, 0], results
    text = results[0].stdout
    assert "steps 7 to 9 were skipped" in text and "sequences 24 to 35" in text
    assert "step_00000004, and on with sequence 36: 20 are passed over" in text
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13)) and not any(line["train/skipped"] for line in lines)
    # Steps 1 to 4 as always; the fifth begins at sequence 36.
    assert [line["train/tokens"] // 32 for line in lines] == [*range(4, 17, 4), *range(40, 69, 4)]
    manifest = read_manifest(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert manifest.step == manifest.optimizer_step == 12 and manifest.consumed_sequences == 68


def test_going_back_to_a_checkpoint_of_shorter_sequences_counts_in_longer_ones(tmp_path: Path) -> None:
    first = train_forked(1, *BASE, f"--train.run_dir={tmp_path / 'short'}", "--train.steps=4")  # 8 of 32 tokens
    assert first.returncode == 0, first
    options = [*BASE, f"--train.run_dir={tmp_path / 'long'}", f"--checkpoint.resume={tmp_path / 'short'}"]
    options += ["--train.sequence_length=64", "--train.steps=8", "--train.max_skipped_steps=2"]
    (result,) = train_faulty(1, {"poison": [[4, 7, NAN]]}, *options)
    assert result.returncode == 0, result
    assert "8 sequences of 32 tokens are 4 of 64" in result.stdout
    assert "step_00000004, and on with sequence 8: 4 are passed over" in result.stdout
    assert [line["train/tokens"] // 64 for line in records(tmp_path / "long")] == [10, 12, 14, 16]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_if_it_happens_again_the_run_ends_with_a_diagnosis(tmp_path: Path, zero_stage: int) -> None:
    options = [*BASE, f"--train.run_dir={tmp_path}", "--train.steps=30", "--checkpoint.every=4"]
    options += ["--train.max_skipped_steps=2", f"--parallel.zero_stage={zero_stage}"]
    results = train_faulty(2, {"poison": [[24, 10**9, NAN]]}, *options)
    assert [result.returncode for result in results] == [65, 65], results
    assert "had gone back to" in results[0].stderr and "diagnosis.json" in results[0].stderr
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    assert [step["step"] for step in diagnosis["steps"]] == [4, 5]  # the first two after going back to step 4
    assert diagnosis["sequences"] == [[32, 36], [36, 40]]
    experts = diagnosis["tensors"]["blocks.1.feed_forward.experts.gate_up"]
    assert experts["gradients_not_finite"] > 0 and experts["weights_not_finite"] == 0 and experts["weight_norm"] > 0
    assert diagnosis["layers"]["layer_01"]["moe/router_entropy"] > 0
    # Nothing bad was saved.
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000004"]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    options = [*BASE, f"--train.run_dir={tmp_path}", "--train.steps=9", "--train.max_skipped_steps=2"]
    (result,) = train_faulty(1, {"poison": [[0, 10**9, NAN]]}, *options)
    assert result.returncode == 65 and "there is no checkpoint to go back to" in result.stderr, result
    assert (tmp_path / "diagnosis.json").exists() and not list_checkpoints(tmp_path / "checkpoints")


def test_a_rank_that_hangs_ends_all_with_where_they_are(tmp_path: Path) -> None:
    options = [*BASE, f"--train.run_dir={tmp_path}", "--train.steps=9", "--train.step_timeout_seconds=4"]
    results = train_faulty(2, {"hang": [1, 2]}, *options)
    assert [result.returncode for result in results] == [70, 70], results
    for rank, result in enumerate(results):
        assert f"rank {rank}: step 3 has not ended within 4 s" in result.stderr, result
        assert "step 3, phase" in result.stderr and "the last was all_to_all_rows of layer 1" in result.stderr
        assert "Current thread" in result.stderr or "Thread 0x" in result.stderr
        assert (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text().count("has not ended") == 1
    assert "in hanging" in results[1].stderr  # the stack of the one that sleeps


def test_a_kill_in_the_middle_of_a_file_costs_only_the_steps_since(tmp_path: Path) -> None:
    options = [*BASE, "--train.steps=14", "--checkpoint.every=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_forked(2, *options, f"--train.run_dir={whole}").returncode == 0
    results = train_faulty(2, {"die_in_save": [1, 8]}, *options, f"--train.run_dir={killed}")
    assert [result.returncode for result in results] == [70, -signal.SIGKILL], results
    assert "rank 1" in results[0].stderr
    assert [folder.name for folder in list_checkpoints(killed / "checkpoints")] == ["step_00000004"]
    again = train_forked(2, *options, f"--train.run_dir={killed}")
    assert again.returncode == 0 and "step_00000004: 4 steps done" in again.stdout, again
    assert losses(killed) == losses(whole)  # to the last bit
    assert not list((killed / "checkpoints").glob("*.part"))


def wait_for_step(folder: Path, step: int, timeout: float = 60) -> None:
    """Until a step is on record."""
    deadline = time.monotonic() + timeout
    while not (folder / "metrics.jsonl").exists() or max(losses(folder), default=0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_of_several_saves_and_stops_all(tmp_path: Path, number: signal.Signals) -> None:
    world_size = 4 if number == signal.SIGUSR1 else 2
    options = [*BASE, f"--train.run_dir={tmp_path}", "--train.global_batch_size=8"]
    ranks = start_forked(world_size, *options, "--train.steps=2000", "--checkpoint.every=1000")
    wait_for_step(tmp_path, 3)
    at = max(losses(tmp_path))
    ranks[-1].kill(number)
    results = wait_for_all(ranks, 60)
    assert [result.returncode for result in results] == [75] * world_size, results
    last = max(losses(tmp_path))
    assert last - at <= 3  # the step under way, and those that ran while this process was looking
    assert f"stopped by {number.name} on rank {world_size - 1}; saved in" in results[0].stdout
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == [f"step_{last:08d}"]
    again = train_forked(world_size, *options, f"--train.steps={last + 2}")
    assert again.returncode == 0 and f"{last} steps done, 2 to do" in again.stdout, again


def test_a_second_signal_ends_a_rank_at_once_even_in_a_collective(tmp_path: Path) -> None:
    ranks = start_faulty(2, {"hang": [1, 2]}, *BASE, f"--train.run_dir={tmp_path}", "--train.steps=9")
    wait_for_step(tmp_path, 2)
    ranks[0].kill(signal.SIGTERM)  # it waits for rank 1
    time.sleep(0.5)
    assert ranks[0].poll() is None
    ranks[0].kill(signal.SIGTERM)
    assert ranks[0].wait(10).returncode == 128 + signal.SIGTERM
    ranks[1].kill(signal.SIGKILL)
    results = wait_for_all(ranks, 30)
    assert "SIGTERM after SIGTERM: ended at once, without saving" in results[0].stderr
    assert not list_checkpoints(tmp_path / "checkpoints")
