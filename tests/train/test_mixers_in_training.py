"""Mixers beside attention in real runs: layouts, what ZeRO-3 partitions, and the checkpoint."""

import json
import sys
from pathlib import Path

import pytest

import moe_train
from moe_train.train.telemetry.records import read_records
from tests.processes import run_process
from tests.train.runs import CPU, SMALL, in_both_precisions, train_forked

STEPS = 6
ALL = (
    "--model.num_layers=6",
    '--model.mixers=["ttt_linear", "infini", "rwkv4", "ttt_mlp", "rwkv7", "attention"]',
    "--model.kv_layers=1",
    "--model.infini.segment_length=24",
    "--model.infini.memory=delta",
    "--model.feed_forward=rwkv_channel_mix",
    "--model.ttt_linear.gate=true",
    "--model.ttt_linear.short_conv=true",
)
# An inner weight of 131,072 elements, which ZeRO-3 partitions: it keeps those below 1e5 whole.
PARTITIONED = (
    "--model.num_layers=2",
    "--model.hidden_size=256",
    "--model.num_heads=2",
    '--model.mixers=["ttt_mlp", "rwkv7"]',
    "--model.feed_forward=rwkv7_channel_mix",
)


@pytest.mark.slow
@pytest.mark.parametrize("model", [ALL, PARTITIONED], ids=["all", "partitioned"])
def test_they_train_alike_in_every_layout(model: tuple[str, ...]) -> None:
    changes = [f"--train.steps={STEPS}", "--train.recompute=block", "--telemetry.every=1"]
    # One process; EP 2; EP 2 with ZeRO 3 on four ranks. The code is 1, for parity asks for more steps.
    command = [sys.executable, "-m", "moe_train", "parity", "--layouts=1,3", "--json"]
    result = run_process([*command, *model, *changes], timeout=500, env=CPU)
    found = json.loads(result.stdout.splitlines()[-1])["layouts"]
    assert [each["steps"] for each in found] == [STEPS] * 3
    assert all(each["loss_difference"] < 1e-5 and each["grad_norm_difference"] < 1e-4 for each in found)


def test_a_checkpoint_in_warm_up_keeps_the_inner_learning_rate_and_goes_on(tmp_path: Path) -> None:
    options = [*SMALL, '--model.mixers=["ttt_mlp", "rwkv7"]', "--model.feed_forward=rwkv7_channel_mix"]
    options += ["--optim.warmup_steps=8", "--data.source=synthetic", "--train.sequence_length=16"]

    def train(folder: str, steps: int) -> Path:
        result = train_forked(1, *options, f"--train.run_dir={tmp_path / folder}", f"--train.steps={steps}")
        assert result.returncode == 0, result
        return tmp_path / folder

    whole, cut = train("whole", 5), train("cut", 3)
    # Of the last step, number 2: a tenth of the rate, and 2 / 8 of the rest.
    run = moe_train.load_run(cut, device="cpu")
    assert dict(run.model.named_buffers())["blocks.0.mixer.warm"].item() == pytest.approx(0.1 + 0.9 * 2 / 8)
    assert len(run.generate("one", max_new_tokens=4, temperature=0)) == 1
    train("cut", 5)
    one, other = (read_records(folder / "metrics.jsonl") for folder in (whole, cut))
    assert [record["train/loss"] for record in other] == pytest.approx([record["train/loss"] for record in one])


@pytest.mark.slow
def test_all_mixers_train_in_bf16_as_in_fp32(tmp_path: Path) -> None:
    """Weights and activations in bf16; states, inner arithmetic and optimizer in fp32."""
    options = [*SMALL, *ALL, "--model.infini.segment_length=8", "--train.sample_tokens=0", "--train.steps=3"]
    found = in_both_precisions(tmp_path, *options, "--data.source=synthetic", "--train.sequence_length=16")
    for narrow, wide in found:
        # A rounding is 2^-9. In the mean of the loss many cancel, in the norm of the gradients fewer.
        assert narrow["train/loss"] == pytest.approx(wide["train/loss"], rel=1e-3)
        assert narrow["train/loss"] != wide["train/loss"]
        assert narrow["train/grad_norm"] == pytest.approx(wide["train/grad_norm"], rel=2e-2)
