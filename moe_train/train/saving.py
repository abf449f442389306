"""Saving of a run's checkpoints: in the background, with messages, and with an error or warning if a save fails."""

from pathlib import Path

import torch

from moe_train.checkpoint.writer import CheckpointWriter, SaveOutcome
from moe_train.config.resolve import ResolvedConfig
from moe_train.data import PreparedData
from moe_train.distributed.collectives import all_reduce_sum, world_group
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.progress import Progress
from moe_train.train.step_control import StepControl


class SaveFailed(RuntimeError):
    """Error for a checkpoint that had to be written, but could not be."""


class Saver:
    """Saver of a run's checkpoints."""

    def __init__(
        self,
        config: ResolvedConfig,
        engine: TrainEngine,
        writer: CheckpointWriter,
        step_control: StepControl,
        plan: BatchPlan,
        data: PreparedData,
        console: RunConsole,
    ) -> None:
        """Prepare for saves.

        Args:
            config: Resolved configuration.
            engine: Engine whose state is saved.
            writer: Writer of checkpoints.
            step_control: Step control, whose state is saved too.
            plan: Sizes of a batch and this rank's place in it.
            data: Data of the run; a checkpoint keeps its tokenizer's fingerprint and its sources' identity.
            console: Console for warnings about failed saves.
        """
        self._config, self._engine, self._writer, self._step_control = config, engine, writer, step_control
        self._plan, self._data, self._console = plan, data, console
        self._last: SaveOutcome | None = None

    def save(self, progress: Progress) -> None:
        """Start to save the current state; without checkpoint.asynchronous, wait until it is saved.

        Raises:
            SaveFailed: On every rank, if the previous save or this one fails and checkpoint.on_error is stop.
            RuntimeError: On every rank, if steps are being skipped because weights are not finite.

        Collective: All ranks.
        """
        # In fp16 steps may have been skipped for their loss scale, which leaves no streak.
        is_doubtful = self._step_control.streak or self._config.train.precision == "fp16"
        if is_doubtful and not self._weights_are_finite():
            raise RuntimeError(
                f"step {progress.step}: weights are not finite, and are not saved; the last checkpoint is untouched"
            )
        config, step_control = self._config, self._step_control.state
        values = {
            "step": progress.step,
            "consumed_sequences": progress.consumed_sequences,
            "tokenizer": self._data.tokenizer.fingerprint,
            "data": [source.to_json() for source in self._data.sources],
            "guard": {"grad_norms": list(step_control.grad_norms), "skipped_steps": step_control.skipped_steps},
            "layout": {
                "world_size": self._plan.world_size,
                "expert_parallel_size": config.parallel.expert_parallel_size,
                "zero_stage": config.parallel.zero_stage,
                "context_parallel_size": config.parallel.context_parallel_size,
            },
            "config": config.model_dump(mode="json"),
        }
        self._take(self._writer.start(self._engine, values))
        if not config.checkpoint.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way, if there is one, and report if it failed.

        Raises:
            SaveFailed: On every rank, if the save failed and checkpoint.on_error is stop.

        Collective: All ranks.
        """
        self._take(self._writer.wait())

    def finish(self, progress: Progress) -> Path:
        """Wait until the state after the last step is saved, and return the checkpoint's folder.

        Raises:
            SaveFailed: On every rank, if the state could not be saved.

        Collective: All ranks.
        """
        self.settle()
        last = self._last
        if last is None or last.folder is None or last.step != progress.step:
            reason = last.error if last is not None else "nothing was written"
            raise SaveFailed(
                f"step {progress.step} could not be saved: {reason}; "
                "what was saved before is untouched: the same command goes on from it"
            )
        return last.folder

    def _take(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        self._last = outcome
        if outcome.error is None:
            return
        message = f"step {outcome.step} could not be saved: {outcome.error}"
        if self._config.checkpoint.on_error == "stop":
            raise SaveFailed(f"{message}; checkpoint.on_error is stop: what was saved before is untouched")
        self._console.say(f"warning: {message}; the run goes on, what was saved before is untouched")

    def _weights_are_finite(self) -> bool:
        faults = sum(sums[1] for sums in self._engine.tensor_sums().values())
        return float(all_reduce_sum(torch.as_tensor(faults).reshape(1), world_group())) == 0
