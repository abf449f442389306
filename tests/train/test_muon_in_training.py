"""Muon in training: the same losses in other layouts, before and after a resume; and from AdamW and back."""

import shutil
from pathlib import Path

import pytest

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from tests.resolved import resolve_for
from tests.train.runs import SMALL, losses, train_forked

MUON = (*SMALL, "--optim.name=muon", "--telemetry.tensorboard=false", "--train.global_batch_size=8")
MUON += ("--train.sample_tokens=0", "--train.steps=8", "--checkpoint.every=4", "--optim.learning_rate=3e-3")
LAYOUTS = [
    (1, ()),
    (2, ("--parallel.expert_parallel_size=2", "--parallel.zero_stage=3")),
    (4, ("--parallel.expert_parallel_size=2", "--parallel.zero_stage=1", "--train.micro_batch_size=1")),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same training in every layout."""
    folders = []
    for world_size, options in LAYOUTS:
        folders.append(tmp_path_factory.mktemp("muon"))
        result = train_forked(world_size, *MUON, *options, f"--train.run_dir={folders[-1]}")
        assert result.returncode == 0, result
    return folders


@pytest.mark.parametrize("index", range(1, len(LAYOUTS)))
def test_losses_are_those_of_one_process(runs: list[Path], index: int) -> None:
    assert losses(runs[index]) == pytest.approx(losses(runs[0]), rel=1e-5)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(0, 1), (1, 2), (2, 0)])
def test_a_checkpoint_goes_on_in_another_layout(
    runs: list[Path], tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[saved_by], folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000008")
    world_size, options = LAYOUTS[loaded_by]
    result = train_forked(world_size, *MUON, *options, f"--train.run_dir={folder}")
    assert result.returncode == 0 and "step_00000004: 4 steps done" in result.stdout, result
    assert losses(folder) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_a_matrix_has_one_moment_in_the_checkpoint(runs: list[Path]) -> None:
    manifest = read_manifest(list_checkpoints(runs[1] / "checkpoints")[-1])
    assert manifest.kinds_of("blocks.1.feed_forward.experts.gate_up") == ("weight", "exp_avg")
    assert manifest.kinds_of("blocks.0.mixer.query.weight") == ("weight", "exp_avg")
    for name in ("embedding.weight", "head.weight", "blocks.1.feed_forward.router.gate.weight", "final_norm.weight"):
        assert manifest.kinds_of(name) == ("weight", "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize(("before", "after"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_goes_on_with_the_weights(tmp_path: Path, before: str, after: str) -> None:
    options = (*MUON, f"--train.run_dir={tmp_path}")
    assert train_forked(1, *options, f"--optim.name={before}", "--train.steps=4").returncode == 0
    result = train_forked(1, *options, f"--optim.name={after}")
    assert result.returncode == 0 and f"optim.name: {before} -> {after}" in result.stdout, result
    assert f"moments of {after} start at zero" in result.stdout
    assert read_manifest(list_checkpoints(tmp_path / "checkpoints")[-1]).optimizer_step == 4  # counted anew


def test_settings_of_muon_are_checked() -> None:
    config = load_config(["--train.run_dir=x", "--optim.name=muon", "--optim.muon.momentun=0.9"], program="t")
    with pytest.raises(UsageError, match=r"optim\.muon\.momentun .* momentum"):
        resolve_for(config, 1)
