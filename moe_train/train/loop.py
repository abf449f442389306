"""The training loop, to be read from top to bottom."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.config.root import Config
from moe_train.data import PreparedData
from moe_train.parallel.traffic import TrafficMeter
from moe_train.train.alarms import ExpertWatch
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.checkpoint import prune_checkpoints, save_checkpoint
from moe_train.train.console import RunConsole, StepLine
from moe_train.train.engine import StepResult, TrainEngine
from moe_train.train.expert_figures import routing_record
from moe_train.train.records import Record
from moe_train.train.run_folder import RunFolder
from moe_train.train.schedule import learning_rate
from moe_train.train.step_window import GlobalStep, StepWindow, reduce_step
from moe_train.train.telemetry import MetricsWriter
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
        meter: What the model's all-to-alls cost; None where nobody asks for the experts.
        writer: Records; None on other ranks than 0.
        watch: Warns of experts; None on other ranks than 0, and where nobody asks.
    """

    config: Config
    folder: RunFolder
    data: PreparedData
    engine: TrainEngine
    plan: BatchPlan
    device: torch.device
    console: RunConsole
    meter: TrafficMeter | None
    writer: MetricsWriter | None
    watch: ExpertWatch | None

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
    window = StepWindow(run.meter) if run.meter is not None else None
    checkpoint = run.folder.checkpoints / f"step_{first_step:08d}"
    with run.console.progress(first_step, num_steps):
        for step in range(first_step, num_steps):
            done, rate = step + 1, learning_rate(step, num_steps, config.optim)
            is_last = done == num_steps
            is_shown = is_last or _is_due(config.train.log_every, done)
            is_written = is_last or _is_due(config.telemetry.every, done)
            is_saved = is_last or _is_due(config.checkpoint.every, done)
            record: Record = {}
            result = _step(run, step, rate, window, clock)
            if is_shown or is_written or is_saved:
                measured = _reduce(run, result, window)
                _refuse_non_finite(run, done, measured)
                if run.writer is not None:
                    shown = _step_record(run, done, rate, result, measured, clock.measure())
                    run.console.step(_step_line(run, done, shown, clock.recent_seconds), is_shown)
                    record = _watched(run, done, shown) if is_written else {}
            if is_written:
                clock.reset()
                if window is not None:
                    window.reset()
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

    @contextmanager
    def step(self) -> Iterator[None]:
        """The block is a step."""
        began = time.monotonic()
        yield
        self._seconds += time.monotonic() - began
        self._steps += 1

    def measure(self) -> float:
        """Mean seconds of a step since the last reset."""
        mean = self._seconds / self._steps
        self._recent.append(mean)
        return mean

    def reset(self) -> None:
        """Begin a new mean."""
        self._seconds, self._steps = 0.0, 0

    @property
    def recent_seconds(self) -> float:
        """Mean seconds of a step over the last measurements."""
        return sum(self._recent) / len(self._recent)


def _step(run: Run, step: int, rate: float, window: StepWindow | None, clock: _Clock) -> StepResult:
    with clock.step(), run.meter.counting() if run.meter is not None else nullcontext():
        batches = micro_batches(run.data.train, run.plan, step, run.isolation_mark, run.device)
        result = run.engine.train_step(batches, rate)
        if window is not None:
            window.add(result)
    return result


def _reduce(run: Run, result: StepResult, window: StepWindow | None) -> GlobalStep:
    if window is None:
        return reduce_step(result, run.plan.world_size)
    return window.reduce(result, run.plan.rank, run.plan.world_size)


def _watched(run: Run, done: int, record: Record) -> Record:
    """The record with what the watch finds in it, which is said on the screen too."""
    if run.watch is None:
        return record
    warnings = run.watch.observe(record)
    for warning in warnings:
        run.console.say(f"step {done:6d}  warning: {warning}")
    return record | run.watch.dead_experts() | ({"moe/alarms": warnings} if warnings else {})


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
    if measured.window is not None:
        record |= routing_record(measured.window, run.config.model.moe_layer_indices)
        record["moe/all_to_all_fraction"] = measured.window.all_to_all_seconds / seconds
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
