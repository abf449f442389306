"""What a rank of a layout does: engines made anew, trained, saved and loaded as `moe-train train` does it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_train.checkpoint.folders import Retention
from moe_train.checkpoint.reader import load_checkpoint
from moe_train.checkpoint.resume_point import latest_valid_of_run
from moe_train.checkpoint.writer import CheckpointWriter
from moe_train.config.load import load_config
from moe_train.data import TrainEntry, TrainingSequences
from moe_train.distributed.bootstrap import discover_world, init_process_group, leave_process_group
from moe_train.distributed.collectives import all_reduce_sum, barrier, world_group
from moe_train.distributed.mesh import create_background_group
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.engine.build import make_engine
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.progress import Progress
from tests.resolved import resolve_for

_DEVICE = torch.device("cpu")
_NUM_TOKENS = 1 << 12  # of the training data
_LEARNING_RATE = 3e-3


class LayoutTraining:
    """This rank in the world of its environment."""

    def __init__(self, options: Sequence[str], vocab_size: int) -> None:
        """Join the world.

        Args:
            options: Of `moe-train train`.
            vocab_size: Of the tokens, which are random.

        Collective: All ranks.
        """
        self.world = discover_world()
        config = load_config([*options, "--train.run_dir=unused"], program="layouts")
        self._config = resolve_for(config, self.world.world_size, self.world.local_world_size, vocab_size)
        train, (rank, size) = self._config.train, (self.world.rank, self.world.world_size)
        init_process_group(self.world, _DEVICE, 100)
        self._plan = BatchPlan(train.micro_batch_size, train.global_batch_size, rank, size)
        tokens = np.random.default_rng(0).integers(vocab_size, size=_NUM_TOKENS)
        self._data = TrainingSequences((TrainEntry(tokens),), train.sequence_length, seed=0)
        self._group = create_background_group()

    def perform(self, num_steps: int, zero_stage: int, save_to: str, load: str | None = None) -> dict[str, Any]:
        """Make an engine; train or load it; save it; train on.

        Args:
            num_steps: Before the save, unless it is loaded, and after it.
            zero_stage: Of the engine.
            save_to: Folder for the checkpoint.
            load: A checkpoint to begin with.

        Returns:
            saved, the checkpoint, and losses of the steps.

        Collective: All ranks.
        """
        size, parallel = self.world.world_size, self._config.parallel.model_copy(update={"zero_stage": zero_stage})
        config = self._config.model_copy(update={"parallel": parallel})
        engine = make_engine(config, _DEVICE)
        progress = Progress()
        losses: list[float] = []
        if load is not None:
            manifest = latest_valid_of_run(Path(load).parent, self.world.rank, size).manifest
            assert manifest is not None and manifest.folder == Path(load)
            load_checkpoint(engine, manifest)
            progress = Progress(manifest.step, manifest.consumed_sequences)
        else:
            progress, losses = self._train(engine, progress, num_steps)
        saved = self._save(engine, progress, Path(save_to))
        losses += self._train(engine, progress, num_steps)[1]
        return {"saved": saved, "losses": losses}

    def leave(self) -> None:
        """End this process, when all ranks are done."""
        barrier()
        leave_process_group(0)

    def _train(self, engine: TrainEngine, progress: Progress, num_steps: int) -> tuple[Progress, list[float]]:
        losses = []
        for _ in range(num_steps):
            size = self._plan.step_size(self._config.train.sequence_length)
            batches = micro_batches(self._data, self._plan, progress, None, _DEVICE)
            loss = engine.train_step(batches, size, _LEARNING_RATE).loss.detach().clone()
            losses.append(float(all_reduce_sum(loss, world_group())) / self._plan.world_size)
            progress = Progress(progress.step + 1, progress.consumed_sequences + self._plan.global_batch_size)
        return progress, losses

    def _save(self, engine: TrainEngine, progress: Progress, checkpoints: Path) -> str:
        writer = CheckpointWriter(checkpoints, self.world.rank, self._group, Retention(1))
        values = {
            "step": progress.step,
            "consumed_sequences": progress.consumed_sequences,
            "tokenizer": "random",
            "guard": {"grad_norms": [], "skipped_steps": 0},
            "layout": {},
            "config": {},
        }
        writer.start(engine, values)
        outcome = writer.wait()
        assert outcome is not None and outcome.folder is not None, outcome
        return str(outcome.folder)
