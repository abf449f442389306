"""Ranks that share sequences, in real runs: the same figures for any number, also after resuming with another."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_train.train.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, NUM_STEPS, OPTIONS
from moe_train.train.telemetry.records import EXPERT_FIGURES, LEARNING_FIGURES
from tests.train.runs import losses, records, train_forked

pytestmark = pytest.mark.slow  # several runs of 20 steps; parity has context layouts in the fast suite
GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    world_size: int
    context_parallel_size: int
    expert_parallel_size: int
    zero_stage: int
    exchange: str = "all_gather"
    recompute: str = "none"

    @property
    def options(self) -> list[str]:
        size = self.context_parallel_size
        return [
            f"--parallel.context_parallel_size={size}",
            f"--parallel.expert_parallel_size={self.expert_parallel_size}",
            f"--parallel.zero_stage={self.zero_stage}",
            f"--train.micro_batch_size={GLOBAL_BATCH * size // self.world_size}",
            f"--train.recompute={self.recompute}",
            *([f"--parallel.context_exchange={self.exchange}"] if size > 1 else []),
        ]


LAYOUTS = (
    Layout(1, 1, 1, 1),
    Layout(2, 2, 1, 2),
    Layout(4, 2, 2, 3, exchange="gather_once", recompute="attention"),
    Layout(4, 4, 2, 1, exchange="ring", recompute="block"),
    Layout(4, 2, 4, 1, exchange="ring"),
)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model with noise, balance of sequences and MLKV, on short documents, some of them held out."""
    folder = tmp_path_factory.mktemp("data")
    words = random.Random(0)
    known = ("a", "be", "see", "dee", "east", "of", "gee")
    lines = [" ".join(words.choices(known, k=words.randint(1, 12))) for _ in range(900)]
    for name, part in (("train", lines[:-20]), ("held_out", lines[-20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    left_out = ("--data.", "--model.moe.bias_update_rate", "--model.num_layers", "--model.hidden_size")
    return [
        *(option for option in OPTIONS if not option.startswith(left_out)),
        "--model.hidden_size=32",
        "--model.num_layers=3",
        "--model.isolate_documents=true",
        "--model.moe.switch_scope=sequence",
        "--data.source=jsonl",
        f"--data.paths={folder / 'train.jsonl'}",
        f"--data.validation_paths={folder / 'held_out.jsonl'}",
        f"--data.cache_dir={folder / 'cache'}",
        f"--train.global_batch_size={GLOBAL_BATCH}",
        "--checkpoint.every=10",
    ]


def train_in(layout: Layout, options: list[str], folder: Path) -> Path:
    result = train_forked(layout.world_size, *options, *layout.options, f"--train.run_dir={folder}", timeout=200)
    assert result.returncode == 0, result
    return folder


@pytest.fixture(scope="module")
def runs(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same training in every layout."""
    return [train_in(layout, options, tmp_path_factory.mktemp("run")) for layout in LAYOUTS]


@pytest.mark.parametrize("index", range(1, len(LAYOUTS)))
def test_figures_are_those_of_one_rank(runs: list[Path], index: int) -> None:
    ours, reference = records(runs[index]), records(runs[0])
    assert [line["step"] for line in ours] == [line["step"] for line in reference] == list(range(1, NUM_STEPS + 1))
    for here, there in zip(ours, reference, strict=True):
        assert here["train/loss"] == pytest.approx(there["train/loss"], rel=LOSS_TOLERANCE)
        assert here["train/grad_norm"] == pytest.approx(there["train/grad_norm"], rel=GRAD_NORM_TOLERANCE)
        assert here["train/tokens"] == there["train/tokens"]
        assert here["moe/counts/layer_01"] == pytest.approx(there["moe/counts/layer_01"], abs=2)
        for name in EXPERT_FIGURES:
            if name != "moe/rank_overload":  # it is about ranks
                assert here[name] == pytest.approx(there[name], rel=5e-3, abs=1e-6), name
    for name in LEARNING_FIGURES:
        assert ours[-1][f"{name}/layer_01"] == pytest.approx(reference[-1][f"{name}/layer_01"], abs=5e-3), name
    assert ours[-1]["val/cross_entropy"] == pytest.approx(reference[-1]["val/cross_entropy"], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 0), (0, 4)])
def test_a_run_goes_on_with_another_size(
    runs: list[Path], options: list[str], tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[saved_by], folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{NUM_STEPS:08d}")
    train_in(LAYOUTS[loaded_by], options, folder)
    here, there = losses(folder), losses(runs[saved_by])
    assert here.keys() == there.keys()
    assert list(here.values()) == pytest.approx(list(there.values()), rel=LOSS_TOLERANCE)


def test_targets_that_are_ignored_count_once(tmp_path: Path) -> None:
    """Shares of a sequence have different numbers of targets, and some have none."""
    data = ("--data.source=synthetic", "--data.ignored_targets=0.9", "--train.steps=4", "--train.seed=5")
    base = [option for option in OPTIONS if not option.startswith(("--data.", "--train.steps", "--train.seed"))]
    base += ["--model.num_layers=2", f"--train.global_batch_size={GLOBAL_BATCH}", *data]
    found = [losses(train_in(LAYOUTS[i], base, tmp_path / str(i))) for i in (0, 1)]
    assert list(found[1].values()) == pytest.approx(list(found[0].values()), rel=LOSS_TOLERANCE)
