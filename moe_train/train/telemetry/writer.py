"""Records of a run, written to metrics.jsonl and TensorBoard: the same names and values.

This is the one door to TensorBoard.
Legend: L MoE layers, E experts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from moe_train.train.telemetry.heatmap import draw_load, encode_png
from moe_train.train.telemetry.records import (
    EXPERT_FIGURES,
    Record,
    append_record,
    complete_record,
    drop_records_from,
    expert_counts,
    layer_name,
    read_records,
)

# The experts one by one, which TensorBoard shows in a chart a layer; metrics.jsonl has their counts as a list. The name
# stands behind all others, so that the scalars begin with those of whole layers.
_EXPERTS = "workload"
_HPARAM_METRICS = ("train/loss", "val/bits_per_byte", "moe/max_violation")


class MetricsWriter:
    """Appends records to metrics.jsonl and, if wanted, to TensorBoard. A full disk ends no run: it is said once."""

    def __init__(self, run_dir: Path, first_step: int, use_tensorboard: bool, say: Callable[[str], None]) -> None:
        """Open the run's records; those of steps from first_step on are dropped, for they are made again.

        Args:
            run_dir: The run's folder.
            first_step: Step that the run begins or goes on with, from 0.
            use_tensorboard: Whether TensorBoard's files are written too.
            say: Told where records cannot be written.
        """
        self._run_dir, self._path, self._say = run_dir, run_dir / "metrics.jsonl", say
        self._uses_tensorboard = use_tensorboard
        self._num_lost = 0
        self._closing: Summary | None = None
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        drop_records_from(self._path, first_step)
        self._board: SummaryWriter | None = None
        if self._uses_tensorboard:
            board = str(self._run_dir / "tensorboard")
            self._board = SummaryWriter(board, purge_step=first_step + 1 if first_step else None)

    def rewind(self, step: int) -> None:
        """Drop the records behind a step: they are made again."""
        try:
            if self._board is not None:
                self._board.close()
            self._open(step)
        except OSError as error:
            self._say(f"warning: {self._path}: records behind step {step} could not be dropped ({error})")

    def records(self) -> list[Record]:
        """What was written so far."""
        return read_records(self._path)

    def describe(self, layers: Sequence[int], fields: Iterable[tuple[str, Any]], config_text: str) -> None:
        """Tell TensorBoard what the run is: its layout of charts, hyper-parameters and configuration.

        Args:
            layers: Index of each MoE layer in the model.
            fields: Hyper-parameters by their dotted names.
            config_text: The configuration, as Markdown.
        """
        if self._board is None:
            return
        values = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in fields}
        experiment, start, self._closing = hparams(values, dict.fromkeys(_HPARAM_METRICS, 0))
        for summary in (experiment, start, custom_scalars(chart_layout(layers))):
            self._add(summary)
        self._board.add_text("config", config_text)

    def write(self, step: int, record: Record) -> None:
        """Write one record: numbers are scalars in TensorBoard, counts of experts a heat map, histograms and charts.

        JSON has no infinity, which fp16's gradient norm is where its scale was too large: it becomes null.
        """
        self._write(step, record, append_record)

    def complete(self, step: int, figures: Record) -> None:
        """Add figures to the last record, if it is of this step; else write one with them alone."""
        self._write(step, figures, complete_record)

    def _write(self, step: int, record: Record, write: Callable[[Path, Record], None]) -> None:
        finite = {name: None if _is_not_finite(value) else value for name, value in record.items()}
        try:
            write(self._path, {"step": step} | finite)
        except OSError as error:
            if self._num_lost == 0:
                self._say(f"warning: step {step}: {self._path} cannot be written ({error}); the run goes on")
            self._num_lost += 1
        if self._board is None:
            return
        try:
            # One event with everything: a tenth of the time of one call a number.
            self._add(record_summary(record), step)
            for warning in record.get("moe/alarms", ()):
                self._board.add_text("moe/alarms", warning, step)
        except OSError as error:
            self._board = None  # its thread has ended
            self._say(f"warning: step {step}: TensorBoard's files cannot be written ({error}); it gets no more records")

    def _add(self, summary: Summary, step: int | None = None) -> None:
        assert self._board is not None and self._board.file_writer is not None, "open until `close`"
        self._board.file_writer.add_summary(summary, step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._num_lost:
            self._say(f"warning: {self._num_lost} records could not be written to {self._path}")
        if self._board is None:
            return
        try:
            if self._closing is not None:
                self._add(self._closing)
            self._board.close()
        except OSError as error:
            self._say(f"warning: TensorBoard's files could not be completed ({error})")


def record_summary(record: Record) -> Summary:
    """A record as TensorBoard keeps it.

    Args:
        record: Scalars by name; moe/counts/layer_NN: tokens of every expert.
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
        shown = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encode_png(picture)
        )
        values.append(Summary.Value(tag="moe/load_heatmap", image=shown))
    return Summary(value=values)


def chart_layout(layers: Sequence[int]) -> Mapping[str, Any]:
    """TensorBoard's custom-scalars layout: what to look at first, then all experts of a layer in one chart.

    Args:
        layers: Index of each MoE layer in the model.
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
        f"{name.removeprefix('moe/').replace('_', ' ')}, by layer": lines(f"{name}/layer_.*")
        for name in (*EXPERT_FIGURES, "moe/dead_experts")
    }
    traffic = {
        "milliseconds of a step in all-to-alls": lines("moe/all_to_all_ms"),
        "share of a step in all-to-alls": lines("moe/all_to_all_fraction"),
        "bytes of a step between ranks": lines("moe/all_to_all_bytes"),
    }
    return {"Experts": experts, "Balance": balance, "Training": training, "Traffic": traffic}


def _histogram(counts: Sequence[int]) -> HistogramProto:
    """The tokens of a layer by the number of their expert: a bucket an expert."""
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


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
