"""The training loop, to be read from top to bottom."""

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
from moe_train.train.run_folder import RunFolder
from moe_train.train.schedule import learning_rate
from moe_train.train.telemetry import GlobalStep, MetricsWriter, Record, reduce_step, routing_record
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
        seconds: Spent in the loop, validation and saving included.
    """

    validation: ValidationResult | None
    checkpoint: Path
    seconds: float


def train(run: Run, first_step: int) -> TrainResult:
    """Train from first_step to the end of the run, validate and save.

    Collective: All ranks.
    """
    config, started = run.config, time.monotonic()
    num_steps = config.train.steps
    recent: deque[float] = deque(maxlen=_RATE_WINDOW)
    checkpoint = run.folder.checkpoints / f"step_{first_step:08d}"
    with run.console.progress(first_step, num_steps):
        for step in range(first_step, num_steps):
            began, rate = time.monotonic(), learning_rate(step, num_steps, config.optim)
            batches = micro_batches(run.data.train, run.plan, step, run.isolation_mark, run.device)
            result = run.engine.train_step(batches, rate)
            done = step + 1
            if done % config.telemetry.every == 0 or done % config.train.log_every == 0 or done == num_steps:
                measured = reduce_step(result, run.plan.world_size)
                recent.append(time.monotonic() - began)
                _report(run, done, rate, result, measured, list(recent))
            if done == num_steps:
                break  # the end validates and saves in full
            if config.train.validate_every and done % config.train.validate_every == 0:
                _validate(run, done, config.train.validation_sequences)
            if config.checkpoint.every and done % config.checkpoint.every == 0:
                checkpoint = _save(run, done)
    if first_step < num_steps:
        checkpoint = _save(run, num_steps)
    validation = _validate(run, num_steps, None)
    return TrainResult(validation, checkpoint, time.monotonic() - started)


def _report(run: Run, done: int, rate: float, result: StepResult, measured: GlobalStep, recent: list[float]) -> None:
    tokens_per_step = run.plan.global_batch_size * run.config.train.sequence_length
    record: Record = {
        "train/loss": measured.loss,
        "train/cross_entropy": measured.cross_entropy,
        "train/lr": rate,
        "train/grad_norm": result.grad_norm,
        "train/tokens": done * tokens_per_step,
        "perf/step_ms": recent[-1] * 1e3,
        "perf/tokens_per_second": tokens_per_step / recent[-1],
    }
    if run.config.train.precision == "fp16":
        record |= {"train/loss_scale": run.engine.loss_scale, "train/skipped": int(result.skipped)}
    if measured.sums is not None:
        record |= routing_record(measured.sums, run.config.model.moe_layer_indices)
    if run.writer is not None:
        run.writer.write(done, record)
    seconds = sum(recent) / len(recent)
    line = StepLine(
        step=done,
        num_steps=run.config.train.steps,
        loss=measured.loss,
        learning_rate=rate,
        grad_norm=result.grad_norm,
        tokens_per_second=tokens_per_step / seconds,
        seconds_left=seconds * (run.config.train.steps - done),
        max_violation=record.get("moe/max_violation"),
    )
    run.console.step(line, is_due=done % run.config.train.log_every == 0 or done == run.config.train.steps)


def _validate(run: Run, done: int, num_sequences: int | None) -> ValidationResult | None:
    if run.data.held_out is None:
        return None
    result = validate(run.engine, run.data.held_out, run.plan, num_sequences, run.isolation_mark, run.device)
    if run.writer is not None:
        run.writer.write(done, {"val/bits_per_byte": result.bits_per_byte, "val/cross_entropy": result.cross_entropy})
    run.console.say(
        f"step {done:6d}  held out: {result.bits_per_byte:.4f} bits/byte, {result.cross_entropy:.4f} nats/token"
    )
    return result


def _save(run: Run, done: int) -> Path:
    folder = save_checkpoint(
        run.engine,
        run.folder.checkpoints,
        run.plan.rank,
        step=done,
        consumed_sequences=done * run.plan.global_batch_size,
        config=run.config.model_dump(mode="json"),
    )
    if run.plan.rank == 0:
        prune_checkpoints(run.folder.checkpoints, run.config.checkpoint.keep_last)
    return folder
