"""A sink: losses as comma-separated lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_train.config.base import Section
from moe_train.train.telemetry.records import Record
from moe_train.train.telemetry.sinks.base import SinkKind, SinkSpec


class CsvConfig(Section):
    """Settings of the sink."""

    separator: str = ","
    """Between the numbers."""


class CsvSink:
    """A line for every record, in losses.csv of the run folder."""

    def __init__(self, spec: SinkSpec) -> None:
        self._path, self._separator = spec.run_dir / "losses.csv", spec.section.separator
        self.rewind(spec.first_step)

    def describe(self, layers: Sequence[int], fields: Mapping[str, Any], config_text: str) -> None:
        del layers, fields, config_text

    def write(self, step: int, record: Record) -> None:
        if "train/loss" in record:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{step}{self._separator}{record['train/loss']}\n")

    def rewind(self, step: int) -> None:
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if int(line.partition(self._separator)[0]) <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def close(self) -> None:
        pass


KIND = SinkKind(CsvSink, CsvConfig)
