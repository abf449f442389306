"""Runs with norms of queries and keys: in every layout the losses of one rank."""

from pathlib import Path

import pytest

from tests.train.runs import SMALL, losses, records, train_forked

TOLERANCE = 1e-4  # relative: fp32, other ranks, sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", ["head", "projection"])
def test_two_ranks_train_as_one_and_go_on_in_another_layout(tmp_path: Path, qk_norm: str) -> None:
    base = [*SMALL, f"--model.qk_norm={qk_norm}", "--model.num_kv_heads=1", "--model.kv_layers=1"]
    base += ["--train.global_batch_size=4", "--optim.learning_rate=1e-2"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    # Balance is a matter of all ranks' micro-batches.
    one = ["--train.micro_batch_size=4", "--train.steps=6"]
    result = train_forked(1, *base, *one, f"--train.run_dir={alone}")
    assert result.returncode == 0, result
    # Experts and all else in parts, weights gathered where they are needed; then on from those parts without.
    two = ["--parallel.expert_parallel_size=2", "--parallel.zero_stage=3", "--train.recompute=block"]
    result = train_forked(2, *base, *two, "--train.steps=4", f"--train.run_dir={shared}")
    assert result.returncode == 0, result
    result = train_forked(1, *base, *one, f"--train.run_dir={shared}")
    assert result.returncode == 0, result
    expected, found = losses(alone), losses(shared)
    assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= TOLERANCE * loss, step
    assert records(alone)[-1]["train/loss"] < records(alone)[0]["train/loss"] - 0.1
