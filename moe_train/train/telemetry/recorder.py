"""Recorder of a run's steps: it times and sums them; when a record is due, it reduces, shows, checks and writes it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from moe_train.config.registry import load_part
from moe_train.config.resolve import ResolvedConfig
from moe_train.distributed.traffic import TrafficMeter
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole, StepLine
from moe_train.train.progress import Progress
from moe_train.train.step_result import StepResult
from moe_train.train.telemetry.load_alarms import LoadAlarms
from moe_train.train.telemetry.load_metrics import routing_record
from moe_train.train.telemetry.metrics_window import GlobalStep, StepWindow, reduce_step
from moe_train.train.telemetry.records import Record
from moe_train.train.telemetry.writer import MetricsWriter

_RATE_WINDOW = 20  # measurements that the shown rate is averaged over


@dataclass(frozen=True)
class FlopsReference:
    """Reference for the speed of a step.

    Attributes:
        flops_per_token: Operations per token that training of the model needs.
        peak_flops: Operations per second that a rank's device can perform.
    """

    flops_per_token: float
    peak_flops: float


class _Clock:
    """Clock of steps. Between two records there is no synchronisation, so that only their mean time is known."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0
        self._recent: deque[float] = deque(maxlen=_RATE_WINDOW)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        began = time.monotonic()
        yield
        self._seconds += time.monotonic() - began

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the block as a step."""
        with self.running():
            yield
        self._steps += 1

    def measure(self) -> float:
        """Measure the mean seconds per step since the last reset."""
        mean = self._seconds / self._steps
        self._recent.append(mean)
        return mean

    def reset(self) -> None:
        """Start a new mean."""
        self._seconds, self._steps = 0.0, 0

    @property
    def recent_seconds(self) -> float:
        """Mean seconds per step over the last measurements."""
        return sum(self._recent) / len(self._recent)


class StepRecorder:
    """Recorder of a run's steps. Between records it waits for no device and no rank."""

    def __init__(
        self,
        config: ResolvedConfig,
        plan: BatchPlan,
        console: RunConsole,
        meter: TrafficMeter | None,
        writer: MetricsWriter | None,
        alarms: LoadAlarms | None,
        reference: FlopsReference | None = None,
    ) -> None:
        """Start without steps.

        Args:
            config: Resolved configuration.
            plan: Sizes of a batch and this rank's place in it.
            console: Console of the run.
            meter: Meter of the model's all-to-alls; None: the experts are not measured.
            writer: Writer of the records; None on ranks other than 0.
            alarms: Alarms about experts; None on ranks other than 0, or if the experts are not measured.
            reference: Reference for the speed; None: the speed is given in tokens only.
        """
        self._config, self._plan, self._console = config, plan, console
        self._meter, self._writer, self._alarms = meter, writer, alarms
        self._reference = reference
        has_noise = meter is not None and load_part("routers", config.model.moe.router).has_noise
        self._noisy_top_k = config.model.moe.top_k if has_noise else 0
        self._window = StepWindow(meter) if meter is not None else None
        self._clock = _Clock()
        self._record: Record = {}
        self._num_skipped = 0  # since the last record

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block as a training step, and count its traffic."""
        with self._clock.step(), self._meter.counting() if self._meter is not None else nullcontext():
            yield

    def add(self, result: StepResult) -> None:
        """Add the result of a step, without synchronisation, and without the sums of a skipped step.

        They may not be finite if fp16 skipped the step.
        """
        self._num_skipped += result.skipped
        if self._window is not None and not result.skipped:
            self._window.add(result)

    def measure(self, progress: Progress, rate: float, result: StepResult, is_shown: bool) -> GlobalStep:
        """Reduce the step over all ranks, in one all-reduce, and show it on rank 0.

        Args:
            progress: Progress after the step.
            rate: Learning rate of the step.
            result: Result of the step.
            is_shown: Whether a line is due if there is no terminal.

        Returns:
            Figures of the step, the same on every rank.

        Collective: All ranks.
        """
        plan = self._plan
        with self._clock.running():  # the device may still be at work on what the host has long asked for
            if self._window is None:
                measured = reduce_step(result, plan.world_size)
            else:
                measured = self._window.reduce(result, plan.rank, plan.world_size)
        seconds = self._clock.measure()
        if self._writer is not None:
            self._record = self._make_record(progress, rate, result, measured, seconds)
            self._console.step(self._line(progress.step), is_shown)
        return measured

    def take(self, done: int) -> Record:
        """Return the record of the step just measured, with alarms, and begin a new window.

        Args:
            done: Number of steps done.

        Returns:
            The record; empty on ranks other than 0.
        """
        self._begin_window()
        if self._alarms is None or "moe/steps" not in self._record:
            return dict(self._record)
        warnings = self._say_all(done, self._alarms.observe({"step": done} | self._record))
        return self._record | self._alarms.dead_experts() | ({"moe/alarms": warnings} if warnings else {})

    def write(self, done: int, record: Record) -> None:
        """Write a record, if it is not empty."""
        if self._writer is not None and record:
            self._writer.write(done, record)

    def complete(self, done: int, figures: Record) -> None:
        """Add figures to the last record, if it is of this step; else write a record with them alone."""
        if self._writer is None:
            return
        if self._alarms is not None and "val/expert_information" in figures:
            warnings = self._say_all(done, self._alarms.observe_validation({"step": done} | figures))
            figures = figures | ({"val/alarms": warnings} if warnings else {})
        self._writer.complete(done, figures)

    def rewind(self, step: int) -> None:
        """Go back to a step: drop the records of later steps, and begin a new window."""
        self._begin_window()
        if self._writer is not None:
            self._writer.rewind(step)
            if self._alarms is not None:
                self._alarms = self._alarms.begun_anew(self._writer.records())

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()

    def _say_all(self, done: int, warnings: list[str]) -> list[str]:
        for warning in warnings:
            self._console.say(f"step {done:6d}  warning: {warning}")
        return warnings

    def _begin_window(self) -> None:
        self._clock.reset()
        self._num_skipped = 0
        if self._window is not None:
            self._window.reset()

    @property
    def _tokens_per_step(self) -> int:
        return self._plan.global_batch_size * self._config.train.sequence_length

    def _make_record(
        self, progress: Progress, rate: float, result: StepResult, measured: GlobalStep, seconds: float
    ) -> Record:
        record: Record = {
            "train/loss": measured.loss,
            "train/cross_entropy": measured.cross_entropy,
            "train/lr": rate,
            "train/grad_norm": measured.grad_norm,
            "train/skipped": self._num_skipped,
            "train/tokens": progress.consumed_sequences * self._config.train.sequence_length,
            "perf/step_ms": seconds * 1e3,
            "perf/tokens_per_second": self._tokens_per_step / seconds,
        }
        if self._reference is not None:
            flops = self._reference.flops_per_token * record["perf/tokens_per_second"] / self._plan.world_size
            record |= {"perf/tflops": flops / 1e12, "perf/mfu": flops / self._reference.peak_flops}
        if self._config.train.precision == "fp16":
            record["train/loss_scale"] = result.loss_scale
        if measured.window is not None:
            layers, copies = self._config.model.moe_layer_indices, self._plan.copies
            record |= routing_record(measured.window, layers, copies, self._noisy_top_k)
            record["moe/all_to_all_fraction"] = measured.window.all_to_all_seconds / seconds
        return record

    def _line(self, done: int) -> StepLine:
        record, seconds = self._record, self._clock.recent_seconds
        return StepLine(
            step=done,
            num_steps=self._config.train.steps,
            loss=record["train/loss"],
            learning_rate=record["train/lr"],
            grad_norm=record["train/grad_norm"],
            tokens_per_second=self._tokens_per_step / seconds,
            seconds_left=seconds * (self._config.train.steps - done),
            max_violation=record.get("moe/max_violation"),
            clean_kappa=record.get("moe/clean_kappa"),
        )
