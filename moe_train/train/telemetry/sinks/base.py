"""Interface of sinks, the places that get a run's records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_train.config.base import Section
from moe_train.train.telemetry.records import Record


class Sink(Protocol):
    """A sink of a run's records, on rank 0. Its functions may raise OSError: then the run continues without it."""

    def describe(self, layers: Sequence[int], fields: Mapping[str, Any], config_text: str) -> None:
        """Take the description of the run, before its first record.

        Args:
            layers: Index in the model of each MoE layer.
            fields: Hyper-parameters by their dotted names.
            config_text: Resolved configuration, YAML.
        """

    def write(self, step: int, record: Record) -> None:
        """Take the record of a step, or further figures of the step. Numbers may be infinite or NaN.

        Args:
            step: Number of steps done.
            record: Figures by their names (docs/telemetry.md); moe/counts/layer_NN: tokens of every expert.
        """

    def rewind(self, step: int) -> None:
        """Drop what was written about steps after this one, because they are taken again."""

    def close(self) -> None:
        """Write what is buffered."""


@dataclass(frozen=True)
class SinkSpec:
    """Settings that a sink is opened with.

    Attributes:
        run_dir: Folder of the run.
        first_step: Number of steps done when this process started; what was written about later steps must be dropped.
        section: Own section of the sink; None: it has none.
    """

    run_dir: Path
    first_step: int
    section: Any


@dataclass(frozen=True)
class SinkKind:
    """Description of a kind of sink.

    Attributes:
        open: Function that opens the sink of a run.
        section: Class of its own settings, written under telemetry.NAME; None: it has none.
    """

    open: Callable[[SinkSpec], Sink]
    section: type[Section] | None = None
