"""The training loop, to be read from top to bottom."""

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.config.root import Config
from moe_train.data import PreparedData
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.checkpoint import prune_checkpoints, save_checkpoint
from moe_train.train.console import RunConsole, StepLine
from moe_train.train.engine import StepResult, TrainEngine
from moe_train.train.records import Record
from moe_train.train.run_folder import RunFolder
from moe_train.train.schedule import learning_rate
from moe_train.train.telemetry import GlobalStep, MetricsWriter, reduce_step, routing_record
from moe_train.train.validate import ValidationResult, validate

_RATE_WINDOW = 20  # steps the shown rate is averaged over


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
        writer: Records; None on other ranks than 0.
    """

    config: Config
    folder: RunFolder
    data: PreparedData
    engine: TrainEngine
    plan: BatchPlan
    device: torch.device
    console: RunConsole
    writer: MetricsWriter | None

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
    config, started, clock = run.config, time.monotonic(), _Clock()
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
            clock.start()
            result = run.engine.train_step(
                micro_batches(run.data.train, run.plan, step, run.isolation_mark, run.device), rate
            )
            if is_shown or is_written or is_saved:
                measured = reduce_step(result, run.plan.world_size)
                shown = _step_record(run, done, rate, result, measured, clock.stop(is_measured=True))
                run.console.step(_step_line(run, done, shown, clock.recent_seconds), is_shown)
                _refuse_non_finite(run, done, measured)
                record = shown if is_written else {}
            else:
                clock.stop(is_measured=False)
            if is_saved:
                checkpoint = _save(run, done)
            if is_last or _is_due(config.train.validate_every, done):
                validation = _validate(run, done, None if is_last else config.train.validation_sequences)
                record |= _validation_record(validation)
            if run.writer is not None and record:
                run.writer.write(done, record)
    if first_step == num_steps:
        validation = _validate(run, num_steps, None)
    return TrainResult(validation, checkpoint, num_steps - first_step, time.monotonic() - started)


class _Clock:
    """Time of steps; those between two records have no synchronisation, so that only their mean is known."""

    def __init__(self) -> None:
        self._began, self._seconds, self._steps = 0.0, 0.0, 0
        self._recent: deque[float] = deque(maxlen=_RATE_WINDOW)

    def start(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def stop(self, is_measured: bool) -> float:
        """A step has ended; if it was measured, returns the mean seconds of a step since the last measured one."""
        self._seconds += time.monotonic() - self._began
        self._steps += 1
        if not is_measured:
            return 0.0
        mean, self._seconds, self._steps = self._seconds / self._steps, 0.0, 0
        self._recent.append(mean)
        return mean

    @property
    def recent_seconds(self) -> float:
        """Mean seconds of a step over the last records."""
        return sum(self._recent) / len(self._recent)


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


def _step_record(run: Run, done: int, rate: float, result: StepResult, measured: GlobalStep, seconds: float) -> Record:
    tokens_per_step = run.plan.global_batch_size * run.config.train.sequence_length
    record: Record = {
        "train/loss": measured.loss,
        "train/cross_entropy": measured.cross_entropy,
        "train/lr": rate,
        "train/grad_norm": measured.grad_norm,
        "train/tokens": done * tokens_per_step,
        "perf/step_ms": seconds * 1e3,
        "perf/tokens_per_second": tokens_per_step / seconds,
    }
    if run.config.train.precision == "fp16":
        record |= {"train/loss_scale": run.engine.loss_scale, "train/skipped": int(result.skipped)}
    if measured.sums is not None:
        record |= routing_record(measured.sums, run.config.model.moe_layer_indices)
    return record


def _step_line(run: Run, done: int, record: Record, seconds: float) -> StepLine:
    return StepLine(
        step=done,
        num_steps=run.config.train.steps,
        loss=record["train/loss"],
        learning_rate=record["train/lr"],
        grad_norm=record["train/grad_norm"],
        tokens_per_second=run.plan.global_batch_size * run.config.train.sequence_length / seconds,
        seconds_left=seconds * (run.config.train.steps - done),
        max_violation=record.get("moe/max_violation"),
    )


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
