"""TensorBoard sink: scalars, one chart with all experts of each layer, histograms and heat maps of expert load.

Legend: L MoE layers, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from moe_train.train.telemetry.heatmap import draw_history, draw_load, encode_png
from moe_train.train.telemetry.records import (
    ALARMS,
    EXPERT_FIGURES,
    LEARNING_FIGURES,
    Record,
    expert_counts,
    layer_name,
    read_records,
)
from moe_train.train.telemetry.sinks.base import SinkKind, SinkSpec

# Scalars of single experts, which TensorBoard shows in one chart per layer; metrics.jsonl has their counts as a list.
# The name is sorted after all others, so that the scalars of whole layers come first.
_EXPERTS = "workload"
_MOST_TIMES = 300  # columns of a picture over time
_TIMES_PER_PICTURE = 25  # columns after which it is written again
_HPARAM_METRICS = ("train/loss", "val/bits_per_byte", "moe/max_violation")


class TensorBoardSink:
    """A sink that writes event files to tensorboard/ of the run's folder."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._folder = run_dir / "tensorboard"
        self._closing: Summary | None = None
        self._history = LoadHistory(record for record in read_records(run_dir / "metrics.jsonl"))
        self._board = self._open(first_step)
        self._last = self._drawn = first_step

    def _open(self, first_step: int) -> SummaryWriter:
        return SummaryWriter(str(self._folder), purge_step=first_step + 1 if first_step else None)

    def describe(self, layers: Sequence[int], fields: Mapping[str, Any], config_text: str) -> None:
        values = {n: value if isinstance(value, bool | int | float) else str(value) for n, value in fields.items()}
        experiment, start, self._closing = hparams(values, dict.fromkeys(_HPARAM_METRICS, 0))
        for summary in (experiment, start, custom_scalars(chart_layout(layers))):
            self._add(summary)
        self._board.add_text("config", f"```yaml\n{config_text}```")

    def write(self, step: int, record: Record) -> None:
        # One event with all numbers takes a tenth of the time of one call per number.
        self._add(record_summary(record), step)
        if self._history.add({"step": step} | record):
            self._add(self._history.summary(), step)
            self._drawn = step
        self._last = step
        for name in ALARMS:
            for warning in record.get(name, ()):
                self._board.add_text(name, warning, step)

    def rewind(self, step: int) -> None:
        self._history.rewind(step)
        self._board.close()
        self._board = self._open(step)

    def close(self) -> None:
        if self._last != self._drawn and self._history.steps:
            self._add(self._history.summary(), self._last)
        if self._closing is not None:
            self._add(self._closing)
        self._board.close()

    def _add(self, summary: Summary, step: int | None = None) -> None:
        assert self._board.file_writer is not None, "open until `close`"
        self._board.file_writer.add_summary(summary, step)


class LoadHistory:
    """Load of every expert over a run, for one picture per layer. Long runs are thinned out to a bound."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        """Start with the records of a run so far."""
        self.steps: list[int] = []
        self._shares: dict[int, list[list[float]]] = {}  # for each layer, every expert's share at each of the steps
        self._every = 1  # of so many records, one is kept
        self._num_seen = 0
        for record in records:
            self.add(record)

    def add(self, record: Record) -> bool:
        """Take in a record, and return whether new pictures are due."""
        counts = expert_counts(record)
        if not counts:
            return False
        self._num_seen += 1
        if self._num_seen % self._every:
            return False
        self.steps.append(record["step"])
        for layer, row in counts.items():
            mean = max(sum(row) / len(row), 1e-9)
            self._shares.setdefault(layer, []).append([count / mean for count in row])
        if len(self.steps) > _MOST_TIMES:
            self._every *= 2
            self._keep(range(1, len(self.steps), 2))
        return len(self.steps) % _TIMES_PER_PICTURE == 0

    def rewind(self, step: int) -> None:
        """Drop what is later than a step."""
        self._keep([place for place, each in enumerate(self.steps) if each <= step])

    def summary(self) -> Summary:
        """Draw the pictures, in TensorBoard's form."""
        values = []
        for layer, rows in self._shares.items():
            picture = draw_history(np.array(rows).T, self.steps)
            values.append(Summary.Value(tag=layer_name("moe/load_over_time", layer), image=_image(picture)))
        return Summary(value=values)

    def _keep(self, places: Sequence[int]) -> None:
        self.steps = [self.steps[place] for place in places]
        self._shares = {layer: [rows[place] for place in places] for layer, rows in self._shares.items()}


def _image(picture: Image.Image) -> Summary.Image:
    width, height = picture.size
    return Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_png(picture))


def record_summary(record: Record) -> Summary:
    """Convert a record to TensorBoard's form.

    Args:
        record: Record of scalars by name; moe/counts/layer_NN: tokens of every expert.
    """
    values = [
        Summary.Value(tag=name, simple_value=value) for name, value in record.items() if isinstance(value, int | float)
    ]
    counts = expert_counts(record)
    for layer, row in counts.items():
        mean = max(sum(row) / len(row), 1e-9)
        values += [
            Summary.Value(tag=f"{layer_name(_EXPERTS, layer)}/expert_{expert:03d}", simple_value=count / mean)
            for expert, count in enumerate(row)
        ]
        values.append(Summary.Value(tag=layer_name("moe/load", layer), histo=_histogram(row)))
    if counts:
        picture = draw_load(np.array(list(counts.values())), list(counts))
        values.append(Summary.Value(tag="moe/load_heatmap", image=_image(picture)))
    return Summary(value=values)


def chart_layout(layers: Sequence[int]) -> Mapping[str, Any]:
    """Make TensorBoard's custom-scalars layout, with all experts of a layer in one chart.

    Args:
        layers: Index in the model of each MoE layer.
    """

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", list(tags)]

    training = {
        "loss": lines("train/loss", "train/cross_entropy", "val/cross_entropy"),
        "bits per byte": lines("val/bits_per_byte"),
        "gradient norm": lines("train/grad_norm"),
        "learning rate": lines("train/lr"),
        "tokens per second": lines("perf/tokens_per_second"),
        "model FLOPs utilisation": lines("perf/mfu"),
    }
    if not layers:
        return {"Training": training}
    experts = {
        f"layer {layer:02d}: tokens of each expert over the mean": lines(f"{layer_name(_EXPERTS, layer)}/.*")
        for layer in layers
    }
    balance = {
        f"{name.removeprefix('moe/').replace('_', ' ').replace('val/', 'held-out ')}, by layer": lines(
            f"{name}/layer_.*"
        )
        for name in (*LEARNING_FIGURES, *EXPERT_FIGURES, "moe/dead_experts")
    }
    traffic = {
        "milliseconds of a step in all-to-alls": lines("moe/all_to_all_ms"),
        "share of a step in all-to-alls": lines("moe/all_to_all_fraction"),
        "bytes of a step between ranks": lines("moe/all_to_all_bytes"),
    }
    return {"Training": training, "Experts": experts, "Balance": balance, "Traffic": traffic}


def _words(name: str) -> str:
    return name.removeprefix("moe/").replace("val/", "held-out ").replace("_", " ")


def _histogram(counts: Sequence[int]) -> HistogramProto:
    """Make a histogram of a layer's tokens by the number of their expert, with one bucket per expert."""
    places = range(len(counts))
    return HistogramProto(
        min=0.0,
        max=float(len(counts)),
        num=float(sum(counts)),
        sum=float(sum(place * count for place, count in zip(places, counts))),
        sum_squares=float(sum(place * place * count for place, count in zip(places, counts))),
        bucket_limit=[float(place + 1) for place in places],
        bucket=[float(count) for count in counts],
    )


def _open(spec: SinkSpec) -> TensorBoardSink:
    return TensorBoardSink(spec.run_dir, spec.first_step)


TENSORBOARD = SinkKind(_open)
