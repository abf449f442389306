"""When and how a run saves: in the background, with what is told of it, and what follows where it fails."""

from pathlib import Path

import torch

from moe_train.checkpoint.writer import CheckpointWriter, SaveOutcome
from moe_train.config.resolve import ResolvedConfig
from moe_train.distributed.collectives import all_reduce_sum, world_group
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.progress import Progress
from moe_train.train.step_control import StepControl


class SaveFailed(RuntimeError):
    """A checkpoint that had to be written could not be."""


class Saver:
    """Saves a run by its configuration."""

    def __init__(
        self,
        config: ResolvedConfig,
        engine: TrainEngine,
        writer: CheckpointWriter,
        step_control: StepControl,
        plan: BatchPlan,
        tokenizer: str,
        console: RunConsole,
    ) -> None:
        """Prepare.

        Args:
            config: The resolved configuration.
            engine: Whose state is saved.
            writer: Writes it.
            step_control: What it remembers is saved too.
            plan: Sizes of a batch and this rank's place.
            tokenizer: Fingerprint of the tokenizer.
            console: Told of what failed.
        """
        self._config, self._engine, self._writer, self._step_control = config, engine, writer, step_control
        self._plan, self._tokenizer, self._console = plan, tokenizer, console
        self._last: SaveOutcome | None = None

    def save(self, progress: Progress) -> None:
        """Begin to save the state after some steps; without checkpoint.asynchronous, wait until it is done.

        Raises:
            SaveFailed: On every rank, if the save before failed or this one does, and checkpoint.on_error is stop.
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
            "tokenizer": self._tokenizer,
            "guard": {"grad_norms": list(step_control.grad_norms), "skipped_steps": step_control.skipped_steps},
            "layout": {
                "world_size": self._plan.world_size,
                "expert_parallel_size": config.parallel.expert_parallel_size,
                "zero_stage": config.parallel.zero_stage,
            },
            "config": config.model_dump(mode="json"),
        }
        self._take(self._writer.start(self._engine, values))
        if not config.checkpoint.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way, if there is one, and tell where it failed.

        Raises:
            SaveFailed: As in `save`.

        Collective: All ranks.
        """
        self._take(self._writer.wait())

    def finish(self, progress: Progress) -> Path:
        """Wait until the state after the last step is saved; its folder.

        Raises:
            SaveFailed: On every rank, if it could not be.

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
