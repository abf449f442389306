"""Models of the speculative benchmark: a dense target, a sparse one, and the draft of both, by ordinary training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner.processes import ROOT, TrainingRun, run_training
from benchmarks.runner.results import say

CONFIG = ROOT / "benchmarks" / "speculative" / "models.yaml"
_RUN_TIMEOUT_SECONDS = 4 * 3600


@dataclass(frozen=True)
class Recipe:
    """A model and its training.

    Attributes:
        name: Folder of its run.
        model: Section `model` of its configuration.
        learning_rate: Peak learning rate.
        steps: Steps of its training, as a multiple of those of the dense target.
    """

    name: str
    model: dict[str, Any]
    learning_rate: float
    steps: int = 1


@dataclass(frozen=True)
class Recipes:
    """The three models, and how many first layers of a target are its other draft.

    Attributes:
        dense: Dense target.
        sparse: Target with MoE layers.
        draft: Draft of both, a quarter of the dense target's parameters.
        own_layers: K of self:K.
        sequence_length: Tokens of a training sequence.
    """

    dense: Recipe
    sparse: Recipe
    draft: Recipe
    own_layers: int
    sequence_length: int

    @property
    def all(self) -> tuple[Recipe, ...]:
        """Recipes in the order of their training."""
        return self.draft, self.sparse, self.dense


def _dense(width: int, layers: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    """Section `model` of a dense model with heads of 64."""
    shape = {"hidden_size": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads}
    return {**shape, "intermediate_size": inner, "head_dim": 64, "moe_every": 0}


def _sparse(width: int, layers: int, heads: int, kv_heads: int, experts: int, top_k: int, inner: int) -> dict[str, Any]:
    """Section `model` of a model with experts in every layer."""
    shape = {"hidden_size": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads}
    coefs = {"importance_cv2_coef": 0.1, "load_cv2_coef": 0.1}
    moe = {"num_experts": experts, "top_k": top_k, "intermediate_size": inner, "router": "noisy_topk", **coefs}
    return {**shape, "moe_every": 1, "moe": moe}


FULL = Recipes(
    # 103 M parameters. The draft has few and wide layers: a layer costs time for its number of operations too.
    dense=Recipe("dense", _dense(768, layers=14, heads=12, kv_heads=4, inner=2304), 5e-4),
    sparse=Recipe("sparse", _sparse(512, layers=6, heads=8, kv_heads=2, experts=64, top_k=8, inner=256), 8e-4),
    draft=Recipe("draft", _dense(640, layers=4, heads=10, kv_heads=2, inner=2048), 8e-4, steps=2),
    own_layers=3,
    sequence_length=128,
)
SMALL = Recipes(
    dense=Recipe("dense", _dense(128, layers=4, heads=2, kv_heads=1, inner=384), 3e-3),
    sparse=Recipe("sparse", _sparse(128, layers=2, heads=2, kv_heads=1, experts=16, top_k=2, inner=128), 3e-3),
    draft=Recipe("draft", _dense(64, layers=1, heads=1, kv_heads=1, inner=192), 3e-3, steps=2),
    own_layers=2,
    sequence_length=64,
)


def train_models(recipes: Recipes, steps: int, seed: int, threads: int, folder: Path) -> dict[str, Path]:
    """Train the models that are not yet there, one after the other.

    Args:
        recipes: Models.
        steps: Steps of the dense target.
        seed: Seed of all runs.
        threads: CPU threads of a run.
        folder: For the run folders; a run that is complete there is used as it is.

    Returns:
        Run folder of each model, by its name.

    Raises:
        RunFailed: A run did not end well.
    """
    folders = {recipe.name: folder / recipe.name for recipe in recipes.all}
    missing = [recipe for recipe in recipes.all if not (folders[recipe.name] / "summary.json").is_file()]

    def note(run: TrainingRun, seconds: float) -> None:
        say(f"{run.name}: loss {run.records()[-1]['val/cross_entropy']:.3f}, {seconds:.0f} s")

    say(f"{len(missing)} models to train")
    run_training(_runs(missing, recipes, steps, seed, threads, folders), 1, _RUN_TIMEOUT_SECONDS, note)
    return folders


def _runs(
    missing: Sequence[Recipe], recipes: Recipes, steps: int, seed: int, threads: int, folders: dict[str, Path]
) -> list[TrainingRun]:
    return [
        TrainingRun(
            recipe.name,
            folders[recipe.name],
            (
                f"--config={CONFIG}",
                f"--model={json.dumps(recipe.model)}",
                f"--optim.learning_rate={recipe.learning_rate}",
                f"--optim.warmup_steps={max(1, recipe.steps * steps // 10)}",
                f"--train.steps={recipe.steps * steps}",
                f"--train.seed={seed}",
                f"--train.sequence_length={recipes.sequence_length}",
                f"--parallel.threads_per_rank={threads}",
            ),
        )
        for recipe in missing
    ]
