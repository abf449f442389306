"""The training loop, to be read from top to bottom."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.checkpoint.folders import step_folder
from moe_train.config.resolve import ResolvedConfig
from moe_train.data import PreparedData
from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.liveness.watchdog import Watchdog
from moe_train.train.batches import BatchPlan, micro_batches, size_of_step
from moe_train.train.console import RunConsole
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.progress import Progress
from moe_train.train.recovery import Recovery
from moe_train.train.run_folder import RunFolder
from moe_train.train.run_lock import RunLock
from moe_train.train.saving import Saver
from moe_train.train.schedule import learning_rate
from moe_train.train.step_control import StepControl, StepDecision
from moe_train.train.step_result import StepResult
from moe_train.train.telemetry.recorder import StepRecorder
from moe_train.train.tracing import StepTracer
from moe_train.train.validate import ValidationResult, validate


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with.

    Attributes:
        config: Resolved configuration.
        folder: Folder of the run.
        lock: Lock of that folder.
        data: Training and held-out sequences.
        engine: Engine with the model and its optimizer.
        plan: Sizes of a batch and this rank's place in it.
        device: Device of this rank.
        console: Console of the run.
        recorder: Recorder of the steps.
        flight_recorder: Recorder of where this process is, for the watchdog.
        step_control: Step control, which judges each step before its update.
        saver: Saver of checkpoints.
        recovery: Recovery, which goes back to a checkpoint if the numbers went wrong.
        watchdog: Watchdog, which ends a step that hangs.
        tracer: Tracer of some steps.
    """

    config: ResolvedConfig
    folder: RunFolder
    lock: RunLock
    data: PreparedData
    engine: TrainEngine
    plan: BatchPlan
    device: torch.device
    console: RunConsole
    recorder: StepRecorder
    flight_recorder: FlightRecorder
    step_control: StepControl
    saver: Saver
    recovery: Recovery
    watchdog: Watchdog
    tracer: StepTracer

    @property
    def isolation_mark(self) -> int | None:
        """End-of-document token if documents are isolated from each other, else None."""
        return self.data.tokenizer.end_of_document if self.config.model.isolate_documents else None


@dataclass(frozen=True)
class TrainResult:
    """Result of training.

    Attributes:
        validation: Loss over all held-out text; None if nothing is held out.
        checkpoint: Folder of the last checkpoint.
        steps: Number of steps taken by this process; fewer than the run's if it resumed from a checkpoint.
        seconds: Seconds that these steps took, validation and saving included.
        stopped: Signal that ended the run before its last step, and the rank that got it; None: the run is complete.
    """

    validation: ValidationResult | None
    checkpoint: Path
    steps: int
    seconds: float
    stopped: str | None = None


def train(run: Run, first: Progress) -> TrainResult:
    """Train to the end of the run, or until a signal asks to stop; validate and save.

    Raises:
        SaveFailed: On every rank, if a checkpoint that had to be written could not be.
        TrainingDiverged: On every rank, if the numbers go wrong for good.

    Collective: All ranks.
    """
    config, recorder, started = run.config, run.recorder, time.monotonic()
    num_steps, num_taken, progress = config.train.steps, 0, first
    validation, stopped = None, None
    with run.console.progress(first.step, num_steps):
        while progress.step < num_steps and stopped is None:
            run.lock.check_known()
            rate = learning_rate(progress.step, num_steps, config.optim)
            result, decision = _take_step(run, progress, rate)
            if decision.save_ended:
                run.saver.settle()
            if decision.is_exhausted:
                run.flight_recorder.at("recover")
                run.lock.check()
                progress = run.recovery.go_back(progress, result)
                continue
            progress, num_taken, stopped = progress.after(run.plan.global_batch_size), num_taken + 1, decision.stop
            done = progress.step
            run.console.tick(done)
            is_last = done == num_steps
            is_written = is_last or stopped is not None or _is_due(config.telemetry.every, done)
            is_shown = is_last or _is_due(config.train.log_every, done)
            if is_shown or is_written:
                recorder.measure(progress, rate, result, is_shown)
            if is_written:  # before the checkpoint: a run that resumes from it does not take this step again
                recorder.write(done, recorder.take(done))
            is_due = decision.save_is_due or _is_due(config.checkpoint.every, done)
            if is_last or stopped is not None or (is_due and not run.step_control.streak):
                run.flight_recorder.at("save")
                run.saver.save(progress)
            if is_last or (stopped is None and _is_due(config.train.validate_every, done)):
                validation = _validate(run, done, None if is_last else config.train.validation_sequences)
    run.tracer.close()
    if first.step == num_steps:
        validation = _validate(run, num_steps, None)
    run.flight_recorder.at("finish")
    checkpoint = run.saver.finish(progress) if num_taken else step_folder(run.folder.checkpoints, first.step)
    # A signal that comes with the last step has nothing left to stop.
    stopped = stopped if progress.step < num_steps else None
    return TrainResult(validation, checkpoint, num_taken, time.monotonic() - started, stopped)


def _take_step(run: Run, progress: Progress, rate: float) -> tuple[StepResult, StepDecision]:
    run.flight_recorder.at("data", progress.step + 1)
    with run.watchdog.watching(f"step {progress.step + 1}"), run.tracer.step(), run.recorder.step():
        batches = micro_batches(run.data.train, run.plan, progress, run.isolation_mark, run.device)
        size = size_of_step(run.data.train, run.plan, progress)
        result = run.engine.train_step(batches, size, rate, run.step_control.should_skip)
        run.recorder.add(result)
    decision = run.step_control.conclude(progress, run.plan.global_batch_size)
    if decision.skipped is not None:
        run.console.say(f"step {progress.step + 1:6d}  skipped: {decision.skipped.reason}")
    return result, decision


def _is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _validate(run: Run, done: int, num_sequences: int | None) -> ValidationResult | None:
    if run.data.held_out is None:
        return None
    run.flight_recorder.at("validate")
    result = validate(
        run.engine,
        run.data.held_out,
        run.plan,
        num_sequences,
        run.isolation_mark,
        run.device,
        run.watchdog.watching,
        run.config.telemetry.experts,
    )
    bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits/byte, "
    run.console.say(f"step {done:6d}  held out: {bits}{result.cross_entropy:.4f} nats/token")
    run.recorder.complete(done, result.figures(run.config.model.moe_layer_indices))
    return result
