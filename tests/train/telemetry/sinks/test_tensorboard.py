"""The TensorBoard sink: what TensorBoard reads of a run's records."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from moe_train.train.telemetry.heatmap import draw_history
from moe_train.train.telemetry.records import Record
from moe_train.train.telemetry.sinks.base import SinkSpec
from moe_train.train.telemetry.sinks.tensorboard import TENSORBOARD, LoadHistory
from tests.train.telemetry.test_writer import RECORD


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What TensorBoard reads of one record and its description."""
    folder = tmp_path_factory.mktemp("board")
    sink = TENSORBOARD.open(SinkSpec(folder, 0, None))
    sink.describe((1, 3), {"model.hidden_size": 32, "model.norm": "rmsnorm", "x.none": None}, "the text\n")
    sink.write(7, RECORD)
    sink.close()
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
    assert board.Tensors("config/text_summary")[0].tensor_proto.string_val[0] == b"```yaml\nthe text\n```"
    (warning,) = board.Tensors("moe/alarms/text_summary")
    assert warning.step == 7 and b"no token" in warning.tensor_proto.string_val[0]


def test_the_layout_shows_all_experts_of_a_layer_in_one_chart(board: EventAccumulator) -> None:
    (event,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Training", "Experts", "Balance", "Traffic"]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[1].chart}
    assert list(charts.values()) == [["workload/layer_01/.*"], ["workload/layer_03/.*"]]
    balance = [tag for chart in layout.category[2].chart for tag in chart.multiline.tag]
    assert "moe/max_violation/layer_.*" in balance and "moe/dead_experts/layer_.*" in balance


def counted(step: int, first: int) -> Record:
    return {"step": step, "moe/counts/layer_01": [first, 10 - first]}


def test_pictures_over_time_keep_a_bounded_number_of_steps() -> None:
    history = LoadHistory()
    due = [step for step in range(1, 2001) if history.add(counted(step, 2))]
    assert due and len(history.steps) <= 300 and history.steps[-1] > 1990 and history.steps == sorted(history.steps)
    (value,) = history.summary().value
    assert value.tag == "moe/load_over_time/layer_01" and value.image.width > 600


def test_pictures_over_time_forget_steps_that_are_taken_again() -> None:
    history = LoadHistory([counted(step, 2) for step in range(1, 41)])
    history.rewind(30)
    assert history.steps == list(range(1, 31))
    assert not history.add({"step": 31, "val/cross_entropy": 1.0}) and history.steps[-1] == 30


def test_a_picture_over_time_shows_a_dying_expert() -> None:
    shares_EN = np.ones((2, 10))
    shares_EN[1, 5:] = 0.0
    pixels = np.array(draw_history(shares_EN, range(10)))
    left, right = pixels[:, 52:352], pixels[:, 352:652]
    black = (20, 20, 20)
    assert not (left == black).all(-1).any()
    assert (right == black).all(-1).sum() == 22 * 300  # one row, of half the steps
