"""Runs with train.compile: the losses of a run without it, in another layout; and what is said without a compiler."""

import sys
from pathlib import Path

import pytest

from tests.processes import run_process
from tests.train.runs import CPU, ROOT, SMALL, losses, train_forked, train_under_torchrun

LAYERS = ("--model.moe_every=2", "--model.moe.num_shared_experts=1", "--train.global_batch_size=4")
TOLERANCE = 1e-4  # relative: fp32, other ranks, sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "attention", "experts", "block"])
def test_two_compiled_ranks_train_as_one_that_is_not(tmp_path: Path, recompute: str) -> None:
    base = [*SMALL, *LAYERS, "--train.validate_every=2", "--train.validation_sequences=8"]
    alone = [*base, "--train.micro_batch_size=4", "--train.steps=6"]  # balance is a matter of all ranks' micro-batches
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    result = train_forked(1, *alone, f"--train.run_dir={plain}")
    assert result.returncode == 0, result
    # ZeRO-2 and expert parallelism, then on from its checkpoint without: the names in it are those of every run.
    options = ["--train.compile=true", f"--train.recompute={recompute}", "--parallel.zero_stage=2"]
    result = train_under_torchrun(2, *base, *options, "--train.steps=4", f"--train.run_dir={compiled}", timeout=300)
    assert result.returncode == 0, result
    result = train_forked(1, *alone, f"--train.run_dir={compiled}")
    assert result.returncode == 0, result
    expected, found = losses(plain), losses(compiled)
    assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= TOLERANCE * loss, step


def test_without_a_compiler_it_says_so_before_it_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_train", "train", *SMALL, "--train.compile=true"]
    environment = CPU | {"CXX": "/nowhere/g++"}
    result = run_process([*command, f"--train.run_dir={tmp_path / 'run'}"], 120, env=environment, cwd=ROOT)
    assert result.returncode == 2, result
    message = result.stderr.strip().splitlines()[-1]
    assert "train.compile (True)" in message and "C++ compiler" in message and "/nowhere/g++" in message, result
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
