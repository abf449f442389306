"""Runs of earlier versions of this program: their checkpoints load, and go on with the same losses in any layout.

`written_before/format_3` is the run folder of commit 4cfe360: two ranks sharing four experts, ZeRO 2, three steps; its
metrics.jsonl has the two steps that followed too, as that commit took them.
"""

import shutil
from pathlib import Path

import pytest

from moe_train.train.telemetry.records import read_records
from tests.train.runs import train_forked

FORMAT_3 = Path(__file__).parent / "written_before" / "format_3"


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ["--parallel.expert_parallel_size=1", "--parallel.zero_stage=1", "--train.micro_batch_size=4"]),
        (2, ["--parallel.expert_parallel_size=2", "--parallel.zero_stage=3", "--train.recompute=experts"]),
    ],
)
def test_a_run_goes_on_with_the_same_losses(ranks: int, options: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(FORMAT_3, run)
    given = [f"--config={run / 'config.yaml'}", f'--data.paths=["{FORMAT_3 / "text.txt"}"]', "--train.steps=5"]
    given += [f"--data.cache_dir={tmp_path / 'cache'}", f"--train.run_dir={run}", *options]
    result = train_forked(ranks, *given)
    assert result.returncode == 0, result
    assert "going on from" in result.stdout and "step_00000003" in result.stdout
    assert "recompute_activations" not in result.stdout  # no change: it has another name now
    assert ("train.recompute: none -> experts" in result.stdout) is (ranks == 2)
    expected, found = (read_records(folder / "metrics.jsonl")[-2:] for folder in (FORMAT_3, run))
    assert [record["step"] for record in found] == [4, 5]
    for ours, theirs in zip(found, expected, strict=True):
        # Sums in another order, and other processors.
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-4)
