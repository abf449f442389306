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
_HEADS_OF_64: dict[str, Any] = {"moe_every": 0, "head_dim": 64}


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


FULL = Recipes(
    # 103 M parameters. The draft has few and wide layers: a layer costs time for its number of operations too.
    dense=Recipe(
        "dense",
        {**_HEADS_OF_64, "hidden_size": 768, "num_layers": 14, "num_heads": 12, "num_kv_heads": 4,
         "intermediate_size": 2304},
        1.5e-3,
    ),
    sparse=Recipe(
        "sparse",
        {"hidden_size": 512, "num_layers": 6, "num_heads": 8, "num_kv_heads": 2,
         "moe_every": 1, "moe": {"num_experts": 64, "top_k": 8, "intermediate_size": 256, "router": "noisy_topk",
                                 "importance_cv2_coef": 0.1, "load_cv2_coef": 0.1}},
        2e-3,
    ),
    draft=Recipe(
        "draft",
        {**_HEADS_OF_64, "hidden_size": 640, "num_layers": 4, "num_heads": 10, "num_kv_heads": 2,
         "intermediate_size": 2048},
        2e-3,
        steps=2,
    ),
    own_layers=3,
    sequence_length=128,
)  # fmt: skip
SMALL = Recipes(
    dense=Recipe(
        "dense",
        {**_HEADS_OF_64, "hidden_size": 128, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1,
         "intermediate_size": 384},
        3e-3,
    ),
    sparse=Recipe(
        "sparse",
        {"hidden_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
         "moe_every": 1, "moe": {"num_experts": 16, "top_k": 2, "intermediate_size": 128, "router": "noisy_topk",
                                 "importance_cv2_coef": 0.1, "load_cv2_coef": 0.1}},
        3e-3,
    ),
    draft=Recipe(
        "draft",
        {**_HEADS_OF_64, "hidden_size": 64, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1,
         "intermediate_size": 192},
        3e-3,
        steps=2,
    ),
    own_layers=2,
    sequence_length=64,
)  # fmt: skip


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
