"""The training loop, to be read from top to bottom."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.config.root import Config
from moe_train.data import PreparedData
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.checkpoint import prune_checkpoints, save_checkpoint
from moe_train.train.console import RunConsole
from moe_train.train.engine import TrainEngine
from moe_train.train.recorder import StepRecorder
from moe_train.train.records import Record
from moe_train.train.run_folder import RunFolder
from moe_train.train.schedule import learning_rate
from moe_train.train.step_window import GlobalStep
from moe_train.train.validate import ValidationResult, validate


@dataclass(frozen=True)
class Run:
    """Everything the loop works with.

    Attributes:
        config: Checked against the world.
        folder: The run's folder.
        data: Training and held-out sequences.
        engine: The model and its optimizer.
        plan: Sizes of a batch and this rank's place.
        device: Where the model is.
        console: What one sees.
        recorder: Follows the steps.
    """

    config: Config
    folder: RunFolder
    data: PreparedData
    engine: TrainEngine
    plan: BatchPlan
    device: torch.device
    console: RunConsole
    recorder: StepRecorder

    @property
    def isolation_mark(self) -> int | None:
        """The end-of-document token where documents are isolated from each other, else None."""
        return self.data.tokenizer.end_of_document if self.config.model.isolate_documents else None


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        validation: Over all held-out text, or None where nothing is held out.
        checkpoint: The last one.
        steps: Steps taken by this process; fewer than the run's where it went on from a checkpoint.
        seconds: Spent on them, validation and saving included.
    """

    validation: ValidationResult | None
    checkpoint: Path
    steps: int
    seconds: float


def train(run: Run, first_step: int) -> TrainResult:
    """Train from first_step to the end of the run, validate and save.

    Collective: All ranks.
    """
    config, recorder, started = run.config, run.recorder, time.monotonic()
    num_steps, validation = config.train.steps, None
    checkpoint = run.folder.checkpoints / f"step_{first_step:08d}"
    with run.console.progress(first_step, num_steps):
        for step in range(first_step, num_steps):
            done, rate = step + 1, learning_rate(step, num_steps, config.optim)
            is_last = done == num_steps
            is_shown = is_last or _is_due(config.train.log_every, done)
            is_written = is_last or _is_due(config.telemetry.every, done)
            is_saved = is_last or _is_due(config.checkpoint.every, done)
            record: Record = {}
            with recorder.step():
                batches = micro_batches(run.data.train, run.plan, step, run.isolation_mark, run.device)
                result = run.engine.train_step(batches, rate)
                recorder.add(result)
            run.console.tick(done)
            if is_shown or is_written or is_saved:
                _refuse_non_finite(run, done, recorder.measure(done, rate, result, is_shown))
            if is_written:
                record = recorder.take(done)
            if is_saved:
                checkpoint = _save(run, done)
            if is_last or _is_due(config.train.validate_every, done):
                validation = _validate(run, done, None if is_last else config.train.validation_sequences)
                record |= _validation_record(validation)
            recorder.write(done, record)
    if first_step == num_steps:
        validation = _validate(run, num_steps, None)
    return TrainResult(validation, checkpoint, num_steps - first_step, time.monotonic() - started)


def _refuse_non_finite(run: Run, done: int, measured: GlobalStep) -> None:
    # The numbers are the same on all ranks, so that all end here. fp16's loss scaler skips such steps by itself, and
    # DeepSpeed gives a norm that is not finite as -1 or inf, by stage.
    is_finite = math.isfinite(measured.loss) and math.isfinite(measured.grad_norm) and measured.grad_norm >= 0
    if not is_finite and run.config.train.precision != "fp16":
        raise RuntimeError(
            f"step {done}: loss {measured.loss}, gradient norm {measured.grad_norm}: training ends "
            "before this is saved; the last checkpoint is untouched (a lower optim.learning_rate may help)"
        )


def _is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _validate(run: Run, done: int, num_sequences: int | None) -> ValidationResult | None:
    if run.data.held_out is None:
        return None
    result = validate(run.engine, run.data.held_out, run.plan, num_sequences, run.isolation_mark, run.device)
    run.console.say(
        f"step {done:6d}  held out: {result.bits_per_byte:.4f} bits/byte, {result.cross_entropy:.4f} nats/token"
    )
    return result


def _validation_record(result: ValidationResult | None) -> Record:
    if result is None:
        return {}
    return {"val/bits_per_byte": result.bits_per_byte, "val/cross_entropy": result.cross_entropy}


def _save(run: Run, done: int) -> Path:
    folder = save_checkpoint(
        run.engine,
        run.folder.checkpoints,
        run.plan.rank,
        step=done,
        consumed_sequences=done * run.plan.global_batch_size,
        tokenizer=run.data.tokenizer.fingerprint,
        config=run.config.model_dump(mode="json"),
    )
    if run.plan.rank == 0:
        prune_checkpoints(run.folder.checkpoints, run.config.checkpoint.keep_last)
    return folder
