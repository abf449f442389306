"""What a place that gets a run's records is: a sink."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_train.config.base import Section
from moe_train.train.telemetry.records import Record


class Sink(Protocol):
    """Gets the records of a run on rank 0. Any of its functions may raise OSError: the run then goes on without it."""

    def describe(self, layers: Sequence[int], fields: Mapping[str, Any], config_text: str) -> None:
        """Take what the run is, before its first record.

        Args:
            layers: Index of each MoE layer in the model.
            fields: Hyper-parameters by their dotted names.
            config_text: The resolved configuration, YAML.
        """

    def write(self, step: int, record: Record) -> None:
        """Take the record of a step, or further figures of it. Numbers may be infinite or undefined.

        Args:
            step: Steps done.
            record: Figures by their names (docs/telemetry.md); moe/counts/layer_NN: tokens of every expert.
        """

    def rewind(self, step: int) -> None:
        """Drop what was written of steps behind this one: they are taken again."""

    def close(self) -> None:
        """Write what is buffered."""


@dataclass(frozen=True)
class SinkSpec:
    """What a sink is opened with.

    Attributes:
        run_dir: The run's folder.
        first_step: Steps that were done when this process started; what was written of later ones is to be dropped.
        section: The sink's own section; None: it has none.
    """

    run_dir: Path
    first_step: int
    section: Any


@dataclass(frozen=True)
class SinkKind:
    """A kind of sink, described by itself.

    Attributes:
        open: Opens the sink of a run.
        title: What it is called in messages.
        section: Settings of its own, written under telemetry.NAME; None: it has none.
    """

    open: Callable[[SinkSpec], Sink]
    title: str
    section: type[Section] | None = None
