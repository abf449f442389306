"""Writer of a run's records to metrics.jsonl and to the sinks that the configuration names."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.train.telemetry.records import (
    Record,
    append_record,
    complete_record,
    drop_records_from,
    read_records,
)
from moe_train.train.telemetry.sinks.base import Sink


class MetricsWriter:
    """Writer of records to metrics.jsonl and to sinks. A full disk does not end the run: there is one warning."""

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        sinks: Mapping[str, Sink],
        say: Callable[[str], None],
        writing: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """Open the run's records, and drop those of steps from first_step on, because they are made again.

        Args:
            run_dir: Folder of the run.
            first_step: Step that the run begins or resumes with, from 0.
            sinks: Opened sinks by their names.
            say: Function that gets a message if records cannot be written.
            writing: Called around every write; it raises a RuntimeError if another run has taken the folder over.
        """
        self._path, self._say, self._writing = run_dir / "metrics.jsonl", say, writing
        self._sinks = dict(sinks)
        self._num_lost = 0
        drop_records_from(self._path, first_step)

    def describe(self, layers: Sequence[int], fields: Mapping[str, Any], config_text: str) -> None:
        """Describe the run to the sinks; see `Sink.describe`."""
        self._tell("of the run's start", lambda sink: sink.describe(layers, fields, config_text))

    def records(self) -> list[Record]:
        """Read the records that were written so far."""
        return read_records(self._path)

    def write(self, step: int, record: Record) -> None:
        """Write the record of a step.

        A number that is not finite becomes null, because JSON has none: fp16's gradient norm is infinite if the loss
        scale was too large.
        """
        self._write(step, record, append_record)

    def complete(self, step: int, figures: Record) -> None:
        """Add figures to the last record, if it is of this step; else write a record with them alone."""
        self._write(step, figures, complete_record)

    def rewind(self, step: int) -> None:
        """Drop the records after a step, because they are made again."""
        try:
            with self._writing():
                drop_records_from(self._path, step)
        except OSError as error:
            self._say(f"warning: {self._path}: records behind step {step} could not be dropped ({error})")
        self._tell(f"behind step {step}", lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Write what is buffered."""
        if self._num_lost:
            self._say(f"warning: {self._num_lost} records could not be written to {self._path}")
        self._tell("at the end", lambda sink: sink.close())

    def _write(self, step: int, record: Record, write: Callable[[Path, Record], None]) -> None:
        finite = {name: None if _is_not_finite(value) else value for name, value in record.items()}
        try:
            with self._writing():
                write(self._path, {"step": step} | finite)
        except OSError as error:
            if self._num_lost == 0:
                self._say(f"warning: step {step}: {self._path} cannot be written ({error}); the run goes on")
            self._num_lost += 1
        self._tell(f"step {step}", lambda sink: sink.write(step, record))

    def _tell(self, what: str, tell: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                tell(sink)
            except OSError as error:
                del self._sinks[name]
                self._say(f"warning: {what}: {name} cannot be written ({error}); it gets no more records")


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
