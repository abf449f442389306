"""Parts of another package, one file and one entry point each: they train in every layout, and everything asks them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.checkpoint.manifest import read_manifest
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.parts import load_kinds
from moe_train.config.registry import _outside, load_part
from moe_train.model.count import count_parameters
from moe_train.plan.devices import DEVICES
from moe_train.plan.layout import Cluster
from moe_train.plan.memory import Decoding
from moe_train.plan.planner import Question, make_plan
from moe_train.train.telemetry.records import read_records
from tests import parts
from tests.processes import run_process

STEPS = 6
PARTS = (
    '--model.mixers=["decay", "attention"]',
    "--model.decay.slowest=0.8",
    "--model.feed_forward=relu",
    "--model.moe.router=hash",
    "--model.moe.hash.salt=3",
    "--model.moe.load_cv2_coef=0",
    "--model.moe.switch_aux_coef=0",
    "--model.moe.balance.even.coef=0.2",
    "--parallel.dispatch=gather",
    "--optim.name=sgd",
    "--optim.sgd.momentum=0.8",
    '--telemetry.sinks=["csv"]',
    "--telemetry.csv.separator=;",
)
PARITY_MODEL = ("--model.num_layers=4", "--model.hidden_size=64", "--model.num_heads=4", "--train.run_dir=unused")


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The parts are found as those of an installed package are."""
    monkeypatch.setattr(sys, "path", [str(parts.FOLDER), *sys.path])
    _outside.cache_clear()
    yield
    _outside.cache_clear()
    load_part.cache_clear()


def moe_train(*arguments: str, code: int = 0) -> str:
    result = run_process([sys.executable, "-m", "moe_train", *arguments], timeout=120, env=parts.PATH)
    assert result.returncode == code, result
    return result.stdout


def test_they_train_alike_in_every_layout_and_go_on_in_another(tmp_path: Path) -> None:
    changes = [f"--train.steps={STEPS}", "--train.recompute=block", "--telemetry.every=1"]
    # One process; EP 2; ZeRO 2; EP 2 with ZeRO 3 on four ranks. The code is 1, for parity asks for more steps.
    given = ["--layouts=1,2,3", "--json", f"--keep={tmp_path}", *PARTS, *changes]
    found = json.loads(moe_train("parity", *given, code=1).splitlines()[-1])["layouts"]
    assert [(each["world_size"], each["zero_stage"], each["steps"]) for each in found] == [
        (1, 1, STEPS),
        (2, 1, STEPS),
        (2, 2, STEPS),
        (4, 3, STEPS),
    ]
    assert all(each["loss_difference"] < 1e-5 and each["grad_norm_difference"] < 1e-4 for each in found)
    lines = (tmp_path / "layout_03" / "losses.csv").read_text().splitlines()
    assert [int(line.split(";")[0]) for line in lines] == list(range(1, STEPS + 1))
    folders = [tmp_path / f"layout_{number:02d}" for number in (0, 3)]
    for folder in folders:
        assert read_manifest(folder / "checkpoints" / f"step_{STEPS:08d}").moments == ("momentum_buffer",)
        moe_train("train", f"--config={folder / 'config.yaml'}", *one_rank(STEPS + 3), f"--train.run_dir={folder}")
    one, other = (read_records(folder / "metrics.jsonl") for folder in folders)
    assert len(one) == STEPS + 3
    for ours, theirs in zip(one, other, strict=True):
        assert theirs["train/loss"] == pytest.approx(ours["train/loss"], rel=1e-5)


def one_rank(steps: int) -> list[str]:
    sizes = ["--parallel.expert_parallel_size=1", "--parallel.zero_stage=1", "--train.micro_batch_size=8"]
    return [*sizes, f"--train.steps={steps}", "--train.global_batch_size=16"]


@pytest.mark.usefixtures("outside")
def test_plan_and_params_count_them() -> None:
    ours = load_config([*PARITY_MODEL, *PARTS, "--train.precision=fp32"], program="t")
    plain = load_config([*PARITY_MODEL, "--model.moe.router=softmax_topk", "--model.moe.load_cv2_coef=0"], program="t")
    # decay and two matrices of [64, 64], in place of four matrices of attention, in two layers; and in these, which
    # have no experts, a feed-forward layer of two matrices in place of three.
    fewer = 2 * (2 * 64 * 64 - 64) + 2 * 64 * ours.model.intermediate_size
    assert count_parameters(plain.model, 300).total - count_parameters(ours.model, 300).total == fewer
    question = Question(Cluster(1, 4, DEVICES["h100"]), decoding=Decoding(3, 100))
    plan = make_plan(ours, 300, question)
    updated = plan.memory.states.partition_elements
    assert plan.memory.states.optimizer_states == 2 * 4 * updated  # weights and one moment
    attention, decay = 2 * 2 * 100 * 64 * 4, 2 * 64 * 4  # of two layers each, fp32
    assert plan.memory.parts["kv_cache"] == 3 * (attention + decay)
    assert plan.traffic.parts["all_to_all_forward"].total > 0


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.feed_forward=rulu", ["feed_forward ('rulu')", "did you mean relu"]),
        ("--model.decay.slowest=2", ["model.decay.slowest", "2", "less than 1"]),
        ("--model.decay.slowest=0.05", ["model.decay.slowest (0.05)", "above 0.1"]),
        ("--model.decay.slow=0.5", ["model.decay.slow", "slowest"]),
        ("--model.moe.hash.salt=13", ["model.moe.hash.salt (13)"]),
        ("--model.moe.balance.even.coef=-1", ["model.moe.balance.even.coef", "-1"]),
        ("--optim.sgd.momentum=1", ["optim.sgd.momentum", "1"]),
        ("--optim.beta1=0.5", ["optim.beta1 (0.5)", "sgd"]),
        ("--telemetry.csv.separater=x", ["telemetry.csv.separater", "separator"]),
        ("--model.moe.load_cv2_coef=0.1", ["load_cv2_coef (0.1)", "hash"]),
    ],
)
def test_wrong_settings_of_theirs_are_named(option: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        config = load_config([*PARITY_MODEL, *PARTS, option], program="t")
        load_kinds(config).check(config)
    for word in words:
        assert word in str(error.value)
