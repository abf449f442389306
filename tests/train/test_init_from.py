"""A run that begins with the weights of another: weights and biases alone, at step 0, in any layout."""

import json
from pathlib import Path

import pytest

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from tests.train.runs import SMALL, losses, train_forked

BASE = (*SMALL, "--telemetry.tensorboard=false", "--train.sample_tokens=0", "--train.global_batch_size=4")
BASE += ("--model.moe.bias_update_rate=0.01", "--optim.learning_rate=1e-2")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    result = train_forked(1, *BASE, "--train.steps=12", f"--train.run_dir={folder}")
    assert result.returncode == 0, result
    return folder


@pytest.mark.parametrize(
    ("world_size", "layout"), [(1, ()), (2, ("--parallel.expert_parallel_size=2", "--parallel.zero_stage=3"))]
)
def test_it_begins_with_the_weights_at_step_0(
    first_run: Path, tmp_path: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    options = (*BASE, *layout, f"--checkpoint.init_from={first_run}", f"--train.run_dir={tmp_path}", "--train.steps=2")
    # A rate of nothing: what is saved at the end is what was loaded.
    result = train_forked(world_size, *options, "--optim.learning_rate=1e-30", "--model.moe.bias_update_rate=1e-30")
    assert result.returncode == 0 and "(12 steps), at step 0 of this run" in result.stdout, result
    assert sorted(losses(tmp_path)) == [1, 2]
    assert losses(tmp_path)[1] < losses(first_run)[1] - 0.2  # it has learned already
    before, after = (read_manifest(list_checkpoints(each / "checkpoints")[-1]) for each in (first_run, tmp_path))
    assert after.step == after.optimizer_step == 2 and after.consumed_sequences == 8
    validated = [
        json.loads(each)["val/cross_entropy"]
        for folder in (first_run, tmp_path)
        for each in [(folder / "metrics.jsonl").read_text().splitlines()[-1]]
    ]
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)
    bias = "blocks.1.feed_forward.router.selection_bias"
    assert before.buffers[bias] == pytest.approx(after.buffers[bias]) and any(before.buffers[bias])


def test_its_own_checkpoint_comes_first_when_it_goes_on(first_run: Path, tmp_path: Path) -> None:
    options = (*BASE, f"--checkpoint.init_from={first_run}", f"--train.run_dir={tmp_path}")
    assert train_forked(1, *options, "--train.steps=3").returncode == 0
    result = train_forked(1, *options, "--train.steps=5")
    assert result.returncode == 0 and "3 steps done, 2 to do" in result.stdout, result
    assert "at step 0 of this run" not in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint.init_from=/nowhere"], ["checkpoint.init_from", "/nowhere"]),
        (["--model.hidden_size=64"], ["model.hidden_size (64)"]),
        (["--data.tokenizer=bpe", "--data.bpe_vocab_size=300"], ["vocab_size"]),
        (["--checkpoint.resume=/elsewhere"], ["init_from", "resume", "leave one out"]),
    ],
)
def test_what_cannot_be_is_refused(first_run: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    base = (*BASE, f"--checkpoint.init_from={first_run}", f"--train.run_dir={tmp_path}", "--train.steps=2")
    result = train_forked(1, *base, *options)
    assert result.returncode == 2 and all(word in result.stderr for word in words), result
