"""Warnings about balance losses that depend on how a step is split, at the start and on resuming."""

import shutil
from pathlib import Path

import pytest

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.config.load import load_config
from moe_train.config.resolve import ResolvedConfig
from moe_train.train.resume import split_warnings
from tests.resolved import resolve_for
from tests.train.runs import SMALL, train_forked


def config_of(world_size: int, *options: str) -> ResolvedConfig:
    base = ("--train.run_dir=unused", "--train.micro_batch_size=2", "--train.global_batch_size=8")
    return resolve_for(load_config([*base, *options], program="t"), world_size)


SWITCH = ("--model.moe.router=softmax_topk", "--model.moe.switch_aux_coef=0.01")


@pytest.mark.parametrize(
    ("world_size", "options", "words"),
    [
        (1, ("--model.moe.balance_scope=micro_step",), ["model.moe.balance_scope (micro_step)", "4 micro-batches"]),
        (2, ("--model.moe.balance_scope=rank",), ["model.moe.balance_scope (rank)", "2 micro-batches"]),
        (1, ("--model.moe.balance_scope=global",), ["model.moe.balance_scope (micro_step)"]),
        (1, (*SWITCH, "--model.moe.switch_scope=global"), ["model.moe.switch_scope (global)", "4 micro-batches"]),
        (1, (*SWITCH, "--model.moe.switch_scope=micro_batch"), ["model.moe.switch_scope (micro_batch)"]),
        (4, ("--model.moe.balance_scope=micro_step",), None),  # a step is one micro-step
        (1, (), None),
        (1, (*SWITCH, "--model.moe.switch_scope=sequence"), None),
        (1, (*SWITCH, "--model.moe.balance_scope=micro_step"), None),  # without CV^2 it does nothing
        (1, ("--model.moe_every=0",), None),
    ],
)
def test_a_scope_within_a_step_is_said_with_accumulation(
    world_size: int, options: tuple[str, ...], words: list[str] | None
) -> None:
    found = split_warnings(config_of(world_size, *options), None)
    assert len(found) == (words is not None)
    assert all(word in found[0] for word in words or ())


def train(folder: Path, *options: str) -> str:
    base = (*SMALL, "--telemetry.tensorboard=false", "--train.global_batch_size=4")
    result = train_forked(1, *base, f"--train.run_dir={folder}", *options)
    assert result.returncode == 0, result
    return result.stdout


def test_another_accumulation_is_said_on_resuming_with_both_numbers(tmp_path: Path) -> None:
    scope = "--model.moe.balance_scope=micro_step"
    first = train(tmp_path / "run", scope, "--train.steps=1")
    assert "a step has 2 micro-batches" in first and "was trained with" not in first
    shutil.copytree(tmp_path / "run", tmp_path / "of_step")

    same = train(tmp_path / "run", scope, "--train.steps=2")
    assert "was trained with" not in same
    other = train(tmp_path / "run", scope, "--train.steps=3", "--train.micro_batch_size=4")
    assert "was trained with 2 micro-batches per rank in a step, this run has 1" in other
    assert "warning: " in other and "model.moe.balance_scope (micro_step)" in other and "a step has" not in other

    of_step = train(tmp_path / "of_step", "--train.steps=2", "--train.micro_batch_size=4")
    assert "warning: " not in of_step  # scope step: nothing depends on it


def test_a_checkpoint_that_does_not_say_is_no_reason_to_warn(tmp_path: Path) -> None:
    train(tmp_path, "--train.steps=1")
    manifest = read_manifest(list_checkpoints(tmp_path / "checkpoints")[-1])
    manifest.layout.clear()  # as in early versions
    config = config_of(4, "--model.moe.balance_scope=rank")
    assert split_warnings(config, manifest) == []


def test_another_factor_of_the_routers_rate_regroups_the_parameters_and_is_said(tmp_path: Path) -> None:
    first = train(tmp_path, "--train.steps=1", "--optim.router_lr_factor=1")
    assert "learning rate of the routers" not in first
    second = train(tmp_path, "--train.steps=2", "--optim.router_lr_factor=0.25", "--parallel.zero_stage=3")
    assert "learning rate of the routers: 0.25 x optim.learning_rate" in second
    assert "changed since: optim.router_lr_factor: 1.0 -> 0.25" in second
    assert "router_lr_factor: 0.25" in (tmp_path / "config.yaml").read_text()
