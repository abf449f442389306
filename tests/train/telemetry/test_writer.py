"""Records: what is written of a run, to JSON lines and to TensorBoard."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from moe_train.train.telemetry.records import drop_records_from, expert_counts, read_records
from moe_train.train.telemetry.writer import MetricsWriter

RECORD = {
    "train/loss": 2.5,
    "moe/max_violation": 1.0,
    "moe/max_violation/layer_01": 1.0,
    "moe/counts/layer_01": [4, 0, 4, 8],
    "moe/counts/layer_03": [1, 1, 1, 1],
    "moe/alarms": ["layer 1, expert 1: no token for 10 steps"],
}


def test_records_of_steps_to_be_made_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "x": i}) + "\n" for i in range(1, 6)) + '{"step": 6, "x')
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]  # a kill may cut the last line
    drop_records_from(path, 3)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, 2, use_tensorboard=False, say=print)
    writer.write(3, {"x": 30})
    writer.close()
    assert [record["x"] for record in read_records(path)] == [1, 2, 30]


def test_layers_are_read_from_the_names_of_a_record() -> None:
    assert expert_counts(RECORD) == {1: [4, 0, 4, 8], 3: [1, 1, 1, 1]}
    assert expert_counts({"moe/counts/layer_117": [1]}) == {117: [1]}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What TensorBoard reads of one record and its description."""
    folder = tmp_path_factory.mktemp("board")
    writer = MetricsWriter(folder, 0, use_tensorboard=True, say=print)
    writer.describe((1, 3), [("model.hidden_size", 32), ("model.norm", "rmsnorm"), ("x.none", None)], "the text")
    writer.write(7, RECORD)
    writer.close()
    (line,) = read_records(folder / "metrics.jsonl")
    assert line == {"step": 7} | RECORD
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    board.Reload()
    return board


def test_scalars_and_a_scalar_an_expert(board: EventAccumulator) -> None:
    (event,) = board.Scalars("train/loss")
    assert (event.step, event.value) == (7, 2.5)
    shares = [board.Scalars(f"workload/layer_01/expert_{i:03d}")[0].value for i in range(4)]
    assert shares == [1, 0, 1, 2]
    assert len([tag for tag in board.Tags()["scalars"] if tag.startswith("workload/layer_03/")]) == 4


def test_a_histogram_has_a_bucket_an_expert(board: EventAccumulator) -> None:
    (event,) = board.Histograms("moe/load/layer_01")
    value = event.histogram_value
    assert (list(value.bucket_limit), list(value.bucket)) == ([1, 2, 3, 4], [4, 0, 4, 8])
    assert (value.min, value.max, value.num) == (0, 4, 16)
    assert value.sum == sum(i * count for i, count in enumerate(value.bucket))


def test_the_heat_map_is_a_picture(board: EventAccumulator) -> None:
    (event,) = board.Images("moe/load_heatmap")
    assert event.encoded_image_string.startswith(b"\x89PNG")
    assert event.width >= 100 and event.height >= 60


def test_hyper_parameters_configuration_and_warnings(board: EventAccumulator) -> None:
    raw = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = plugin_data_pb2.HParamsPluginData.FromString(raw).session_start_info.hparams
    assert given["model.hidden_size"].number_value == 32
    assert given["model.norm"].string_value == "rmsnorm" and given["x.none"].string_value == "None"
    raw = board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(raw).experiment.metric_infos
    assert "train/loss" in {metric.name.tag for metric in metrics}
    assert board.Tensors("config/text_summary")[0].tensor_proto.string_val[0] == b"the text"
    (warning,) = board.Tensors("moe/alarms/text_summary")
    assert warning.step == 7 and b"no token" in warning.tensor_proto.string_val[0]


def test_the_layout_shows_all_experts_of_a_layer_in_one_chart(board: EventAccumulator) -> None:
    (event,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Experts", "Balance", "Training", "Traffic"]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert list(charts.values()) == [["workload/layer_01/.*"], ["workload/layer_03/.*"]]
    balance = [tag for chart in layout.category[1].chart for tag in chart.multiline.tag]
    assert "moe/max_violation/layer_.*" in balance and "moe/dead_experts/layer_.*" in balance


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, use_tensorboard=True, say=print)
    writer.write(1, {"train/grad_norm": math.inf, "train/loss": 1.0})
    writer.close()
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "train/grad_norm": None, "train/loss": 1.0}]
