"""What the doctor writes and the planner reads."""

import json
from pathlib import Path

import pytest
import yaml

from moe_train.config.errors import UsageError
from moe_train.config.machine import Machine, read_machine
from moe_train.plan.devices import DEVICES, find_device
from moe_train.plan.layout import Cluster

MACHINE = DEVICES["h200"]


def written(folder: Path, text: str) -> Path:
    path = folder / "machine.json"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "make_text",
    [
        pytest.param(lambda fields: json.dumps(fields), id="bare"),
        pytest.param(lambda fields: yaml.safe_dump(fields), id="yaml"),
        pytest.param(lambda fields: json.dumps({"passed": True, "machine": fields}), id="report"),
        pytest.param(lambda fields: "a launcher's line\n" + json.dumps({"machine": fields}) + "\n", id="stdout"),
    ],
)
def test_round_trip(tmp_path: Path, make_text) -> None:
    assert read_machine(written(tmp_path, make_text(MACHINE.model_dump(mode="json")))) == MACHINE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bytes": 0}, "memory_bytes: Input should be greater than 0"),
        ({"flops_per_second": {"int8": 1.0}}, "flops_per_second.int8"),
        ({"inter_node": {"all_to_all": {"latency_seconds": -1, "bytes_per_second": 1}}}, "inter_node.all_to_all"),
        ({"colour": "green"}, "colour"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, change: dict, message: str) -> None:
    path = written(tmp_path, json.dumps(MACHINE.model_dump(mode="json") | change))
    with pytest.raises(UsageError) as raised:
        read_machine(path)
    assert str(raised.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{nonsense", "is neither JSON nor YAML"), ('{"machine": null}', "the file"), ("", "the file")],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_machine(written(tmp_path, text))
    with pytest.raises(UsageError, match="cannot be read"):
        read_machine(tmp_path / "nowhere")


def test_a_network_that_is_not_known_is_asked_for() -> None:
    def without(name: str) -> Machine:
        return MACHINE.model_copy(update={name: None})

    Cluster(1, 8, without("inter_node"))
    Cluster(8, 1, without("intra_node"))
    with pytest.raises(UsageError, match=r"--nodes \(2\): nothing is known of links between nodes of NVIDIA H200"):
        Cluster(2, 8, without("inter_node"))
    with pytest.raises(UsageError, match=r"--gpus-per-node \(2\): nothing is known of links inside of a node"):
        Cluster(2, 2, without("intra_node"))


def test_the_port_between_nodes_can_be_given(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(MACHINE.model_copy(update={"inter_node": None}).model_dump(mode="json")))
    machine = find_device(str(path), 100.0)
    assert machine.inter_node is not None and machine.inter_node.all_reduce.bytes_per_second == 100e9 / 8
