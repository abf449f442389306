"""Recovery from bad numbers: back to the last good checkpoint, and past the data since then; once."""

from pathlib import Path

from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.reader import load_checkpoint
from moe_train.checkpoint.resume_point import latest_valid_of_run, quarantine_damaged
from moe_train.config.errors import TrainingDiverged
from moe_train.distributed.collectives import Group
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole
from moe_train.train.diagnosis import diagnose, summarize, write_diagnosis
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.progress import Progress, progress_at
from moe_train.train.saving import Saver
from moe_train.train.step_control import StepControl
from moe_train.train.step_result import StepResult
from moe_train.train.telemetry.recorder import StepRecorder


class Recovery:
    """Recovery of a run from its last checkpoint."""

    def __init__(
        self,
        engine: TrainEngine,
        step_control: StepControl,
        saver: Saver,
        recorder: StepRecorder,
        console: RunConsole,
        plan: BatchPlan,
        sequence_length: int,
        checkpoints: Path,
        layers: tuple[int, ...],
        group: Group | None,
        origin: Manifest | None,
    ) -> None:
        """Prepare for recoveries.

        Args:
            engine: Engine whose state is replaced.
            step_control: Step control, which knows the skipped steps.
            saver: Saver, whose running save is waited for.
            recorder: Recorder, which drops the steps that are taken again.
            console: Console for messages.
            plan: Sizes of a batch and this rank's place in it.
            sequence_length: Tokens per sequence; a checkpoint may have been written with another.
            checkpoints: Folder of the run's checkpoints; the diagnosis is written beside it.
            layers: Index in the model of each MoE layer.
            group: Group of the checkpoint writer, which is idle when a checkpoint is read.
            origin: Checkpoint that the run resumed from, for as long as the run has saved none itself.
        """
        self._group, self._origin = group, origin
        self._engine, self._step_control, self._saver, self._recorder = engine, step_control, saver, recorder
        self._console, self._plan, self._checkpoints, self._layers = console, plan, checkpoints, layers
        self._sequence_length = sequence_length
        self._gone_back_from: int | None = None  # step, from 0, that the last return was for

    def go_back(self, progress: Progress, result: StepResult) -> Progress:
        """Load the newest valid checkpoint; training continues after the data that was handed out so far.

        Args:
            progress: Progress before the last skipped step.
            result: Result of the last skipped step.

        Returns:
            The progress to continue from.

        Raises:
            TrainingDiverged: On every rank, with a diagnosis, if there is no checkpoint, or if this happens a second
                time before a checkpoint of a later step than the first time.

        Collective: All ranks.
        """
        skipped = self._step_control.streak
        diagnosis = diagnose(self._engine, skipped, result.sums, self._layers)
        summary, path = summarize(diagnosis), self._checkpoints.parent / "diagnosis.json"
        if self._plan.rank == 0:
            try:
                write_diagnosis(path, diagnosis)
            except OSError as error:
                self._console.say(f"warning: {path} could not be written: {error}")
        self._saver.settle()
        point = latest_valid_of_run(self._checkpoints, self._plan.rank, self._plan.world_size, self._group)
        for line in quarantine_damaged(point, self._plan.rank):
            self._console.say(line)
        manifest, before = point.manifest or self._origin, self._gone_back_from
        if manifest is None:
            raise TrainingDiverged(f"{summary}; there is no checkpoint to go back to; more in {path}")
        if before is not None and manifest.step <= before:
            raise TrainingDiverged(
                f"{summary}; the run had gone back to {manifest.folder} for this already, from step {before + 1}, and "
                f"passed over the data; more in {path} (a lower optim.learning_rate may help)"
            )
        self._gone_back_from = progress.step
        load_checkpoint(self._engine, manifest, self._group)
        self._step_control.restore(manifest.step_control)
        self._recorder.rewind(manifest.step)
        first = progress_at(manifest, self._sequence_length).consumed_sequences
        passed = progress.consumed_sequences + self._plan.global_batch_size
        self._console.say(
            f"step {progress.step + 1:6d}  {summary}; going back to {manifest.folder}, and on with sequence {passed}: "
            f"{passed - first} are passed over"
        )
        return Progress(manifest.step, passed)
