"""Tokens a second beside the peers': rows, claims, the command line, and where the trainer's times come from."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.train.peers import build_mixtral
from benchmarks.train.report import show
from benchmarks.train.rows import (
    AUTOEP,
    OURS,
    WARM_UP_STEPS,
    ZERO1,
    Outcome,
    Setting,
    claims_of,
    record_times,
    rows_of,
    trainer_options,
)
from benchmarks.train.run import main
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.model.count import count_parameters
from moe_train.train.telemetry.sinks.base import SinkSpec
from moe_train.train.telemetry.sinks.tensorboard import TENSORBOARD
from moe_train.train.telemetry.writer import MetricsWriter

SETTING = Setting(
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    experts=4,
    top_k=2,
    inner=16,
    vocabulary=300,
    sequence=10,
    micro_batch=5,
    ranks=2,
    threads=1,
    dtype="fp32",
    steps=10,
)


def outcomes(seconds: list[float], parameters: int = 7) -> list[Outcome]:
    return [Outcome(each, parameters, 5.0) for each in seconds]


def test_ratios_are_of_the_same_round() -> None:
    # The second round was ten times as slow as the others, for both.
    rows = rows_of(SETTING, {OURS: outcomes([1.0, 10.0, 2.0]), ZERO1: outcomes([1.6, 15.0, 2.8])}, {ZERO1: "eager"})
    assert [row.ratio for row in rows] == pytest.approx([1.0, 1.5])
    assert rows[1].ratio_quartiles == pytest.approx((1.45, 1.55))
    # 2 ranks x 5 sequences x 10 tokens x 10 steps
    assert [row.tokens_per_second for row in rows] == pytest.approx([500.0, 1000 / 2.8])
    assert asdict(rows[1])["detail"] == "eager"


@pytest.mark.parametrize(("ratio", "holds"), [(1.51, True), (1.49, False)])
def test_claim_is_about_each_peer(ratio: float, holds: bool) -> None:
    measured = {OURS: outcomes([1.0]), ZERO1: outcomes([ratio]), AUTOEP: outcomes([2.0]), "further": outcomes([9.0])}
    claims = claims_of(SETTING, rows_of(SETTING, measured, {}))
    assert [claim["holds"] for claim in claims] == [holds, True, True]
    assert f"{ZERO1}: {ratio:.2f} times" in claims[0]["claim"]
    one_rank = replace(SETTING, ranks=1)
    assert len(claims_of(one_rank, rows_of(one_rank, measured, {}))) == 1


def test_a_model_of_another_size_is_told() -> None:
    rows = rows_of(SETTING, {OURS: outcomes([1.0]), ZERO1: outcomes([1.0], parameters=8)}, {})
    assert claims_of(SETTING, rows)[-1] == {
        "claim": "All systems train a model of the same number of parameters: 7, 8.",
        "holds": False,
    }


def test_without_our_trainer_there_is_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows = rows_of(SETTING, {AUTOEP: outcomes([1.0, 3.0])}, {})
    assert row.ratio is None and row.quartiles == pytest.approx((500.0, 833.333), rel=1e-4)
    assert claims_of(SETTING, rows) == []
    machine = {"cpu": "a processor", "cores": 2, "bf16": [], "torch": "2", "deepspeed": "0", "transformers": None}
    figures = {"machine": machine, "rounds": 2, "peers_keep_freed_memory": False, "left_out": {ZERO1: "[a reason]"}}
    show(figures, SETTING, rows, [])
    printed = capsys.readouterr().out
    assert "transformers not installed" in printed and "Left out: hf_zero1, for [a reason]" in printed


def test_times_are_those_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = {"TensorBoard": TENSORBOARD.open(SinkSpec(tmp_path, 0, None))}
    writer = MetricsWriter(tmp_path, 0, sinks, say=print)
    for step, now in ((WARM_UP_STEPS, 100.25), (WARM_UP_STEPS + 5, 103.5)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        writer.write(step, {"train/loss": 1.0, "perf/step_ms": 1.0})
    writer.complete(WARM_UP_STEPS + 5, {"val/cross_entropy": 1.0})
    writer.close()
    assert record_times(tmp_path / "tensorboard") == {WARM_UP_STEPS: 100.25, WARM_UP_STEPS + 5: 103.5}


def test_mixtral_has_the_trainers_size() -> None:
    pytest.importorskip("transformers", reason="an optional extra: pip install -c requirements/constraints.txt '.[hf]'")
    config = load_config([*trainer_options(SETTING), "--train.run_dir=run"], program="test")
    mixtral = build_mixtral(config.model, SETTING.sequence, "grouped_mm")
    num_parameters = sum(parameter.numel() for parameter in mixtral.parameters())
    assert num_parameters == count_parameters(config.model, SETTING.vocabulary).total
    assert mixtral.config.rope_parameters["rope_theta"] == config.model.rope_theta
    ids_BS = torch.arange(20).view(2, 10)
    assert mixtral(input_ids=ids_BS, labels=ids_BS, shift_labels=ids_BS).aux_loss > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "12"], "--steps (12) must be a multiple of 5"),
        (["--experts", "7"], "--experts (7) must be divisible by --ranks (2)"),
        (["--top-k", "9"], "--top-k (9) must be at most --experts (8)"),
        (["--kv-heads", "0"], "--kv-heads (0) must be 1 or more"),
        (["--ours", "a"], "--ours ('a') must be"),
        (["--ours", "moe_train=--train.seed=1"], "there is a row 'moe_train' already"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and message in printed.err and printed.out == ""


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ("a=--train.sed=1", "--ours a: "),
        ("a=--telemetry.every=7", "--ours a: telemetry.every (7) must stay 5"),
    ],
)
def test_further_rows_that_cannot_be_measured_are_refused(further: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        main(["--ours", further])
    assert message in str(refused.value)
