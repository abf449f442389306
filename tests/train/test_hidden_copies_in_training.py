"""Hidden copies in real runs: layouts, checkpoints of other numbers of copies, metrics, refusals, and generation."""

import json
import sys
from pathlib import Path

import pytest

import moe_train
from moe_train.train.telemetry.records import read_records
from tests.processes import run_process
from tests.train.runs import CPU, SMALL, in_both_precisions, train_forked

COPIES = ("--model.hidden_copies.copies=3", "--model.hidden_copies.window_positions=2", "--model.hidden_copies.chunk=8")
DATA = ("--data.source=synthetic", "--train.sequence_length=16")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
def test_they_train_alike_in_every_layout(recompute: str) -> None:
    changes = ["--train.steps=4", "--telemetry.every=1", "--model.kv_layers=2", "--model.isolate_documents=true"]
    command = [sys.executable, "-m", "moe_train", "parity", "--layouts=1,2,3", "--json"]
    result = run_process([*command, *COPIES, *changes, f"--train.recompute={recompute}"], timeout=500, env=CPU)
    found = json.loads(result.stdout.splitlines()[-1])["layouts"]  # the code is 1, for parity asks for more steps
    assert [each["steps"] for each in found] == [4] * len(found) and len(found) >= 3
    assert all(each["loss_difference"] < 1e-5 and each["grad_norm_difference"] < 1e-4 for each in found)


def test_any_number_of_copies_goes_on_from_any_other(tmp_path: Path) -> None:
    def train(steps: int, *options: str) -> dict:
        folder = f"--train.run_dir={tmp_path / 'run'}"
        result = train_forked(1, *SMALL, *DATA, folder, f"--train.steps={steps}", *options)
        assert result.returncode == 0, result
        return read_records(tmp_path / "run" / "metrics.jsonl")[-1]

    plain, with_copies = train(3), train(6, *COPIES)
    assert "moe/assignments_with_copies" not in plain
    assert with_copies["moe/copies"] == 3
    # 2 sequences of 16 tokens, 3 copies, top 2, one MoE layer.
    assert with_copies["moe/assignments_with_copies"] == 2 * 16 * 3 * 2
    assert with_copies["perf/tokens_per_second"] == pytest.approx(2 * 16 / with_copies["perf/step_ms"] * 1e3)
    run = moe_train.load_run(tmp_path / "run", device="cpu")
    assert run.model.stream_hook is not None
    assert len(run.generate("one", "and another", max_new_tokens=4, temperature=0)) == 2
    assert "moe/copies" not in train(8)


def test_they_train_in_bf16_as_in_fp32(tmp_path: Path) -> None:
    for narrow, wide in in_both_precisions(tmp_path, *SMALL, *DATA, *COPIES, "--train.steps=3"):
        # A rounding is 2^-9. In the mean of the loss many cancel, in the norm of the gradients fewer.
        assert narrow["train/loss"] == pytest.approx(wide["train/loss"], rel=1e-3)
        assert narrow["train/loss"] != wide["train/loss"]
        assert narrow["train/grad_norm"] == pytest.approx(wide["train/grad_norm"], rel=2e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.mixer=rwkv7"], ["copies (3)", "model.mixers ('rwkv7')"]),
        (["--model.feed_forward=rwkv_channel_mix"], ["copies (3)", "model.feed_forward ('rwkv_channel_mix')"]),
        (["--model.moe.capacity_factor=1.5"], ["moe.capacity_factor (1.5)", "copies (3)"]),
    ],
    ids=["mixer", "feed-forward layer", "capacity"],
)
def test_what_has_no_meaning_is_refused(tmp_path: Path, options: list[str], words: list[str]) -> None:
    result = train_forked(1, *SMALL, *DATA, *COPIES, *options, f"--train.run_dir={tmp_path}", "--train.steps=1")
    assert result.returncode == 2
    for word in words:
        assert word in result.stderr
