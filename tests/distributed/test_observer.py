"""Where a process is, as its all-to-alls tell it."""

import pytest
import torch

from moe_train.distributed.all_to_all import Splits, start_counts, start_rows
from moe_train.distributed.collectives import world_group
from moe_train.distributed.flight_recorder import CollectiveRecord, FlightRecorder
from moe_train.distributed.observer import CommObserver
from moe_train.distributed.traffic import TrafficMeter
from moe_train.model.build import ExpertPlacement, build_model
from tests.model.small import small_config


class Listening(FlightRecorder):
    """Keeps every all-to-all that was noted, and whether each was left."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict] = []
        self.num_left = 0

    def begin(self, collective) -> None:
        super().begin(collective)
        self.seen.append(self.as_dict()["collective"])

    def end(self) -> None:
        super().end()
        self.num_left += 1


def exchange_twice(rank, world_size):
    flight_recorder, group = Listening(), world_group()
    probes = [CommObserver(flight_recorder=flight_recorder, layer=layer) for layer in (1, 3)]
    rows = torch.ones(3, 2, requires_grad=True)
    send, receive = ([1, 2], [1, 1]) if rank == 0 else ([1, 2], [2, 2])
    splits = Splits(tuple(send), tuple(receive))
    start_counts(torch.ones(2, 4, dtype=torch.int64), group, probes[0]).wait()
    arrived = start_rows(rows, splits, group, probes[0]).wait()
    back = start_rows(arrived, splits.back, group, probes[1]).wait()
    back.sum().backward()
    return flight_recorder.seen, flight_recorder.num_left, flight_recorder.describe()


def test_layer_direction_and_splits_of_every_all_to_all(pool2) -> None:
    for rank, (seen, num_left, text) in enumerate(pool2.run(exchange_twice, timeout=60)):
        send, receive = ([1, 2], [1, 1]) if rank == 0 else ([1, 2], [2, 2])
        rows = "all_to_all_rows"
        expected = [
            ("all_to_all_counts", 1, "forward", [1, 1], [1, 1]),
            (rows, 1, "forward", send, receive),
            (rows, 3, "forward", receive, send),
            (rows, 3, "backward", send, receive),
            (rows, 1, "backward", receive, send),
        ]
        assert [tuple(collective.values()) for collective in seen] == expected
        assert num_left == len(expected)
        last = f"all_to_all_rows of layer 1, backward: send {receive}, receive {send}"
        assert text == f"phase start, in no all-to-all; the last was {last}"


def test_a_position_in_words_and_as_plain_values() -> None:
    flight_recorder = FlightRecorder()
    assert flight_recorder.describe() == "phase start"
    flight_recorder.at("forward", 7)
    assert flight_recorder.describe() == "step 7, phase forward"
    observer = CommObserver(flight_recorder=flight_recorder, layer=2)
    started = CollectiveRecord("all_to_all_rows", 2, "forward", (4, 0), (1, 2))
    with observer.starting(started, 10):
        pass
    text = "all_to_all_rows of layer 2, forward: send [4, 0], receive [1, 2]"
    assert flight_recorder.describe() == f"step 7, phase forward, in no all-to-all; the last was {text}"
    with observer.waiting(started):
        collective = "all_to_all_rows of layer 2, forward: send [4, 0], receive [1, 2]"
        assert flight_recorder.describe() == f"step 7, phase forward, in {collective}"
    place = flight_recorder.as_dict()
    assert place["collective"] is None and place["last_collective"]["receive"] == [1, 2]
    moves = flight_recorder.num_moves
    flight_recorder.at("update")
    assert (flight_recorder.step, flight_recorder.phase) == (7, "update") and flight_recorder.num_moves > moves


def test_after_an_error_the_note_stays_until_the_next_phase() -> None:
    flight_recorder, meter = FlightRecorder(), TrafficMeter(torch.device("cpu"))
    failing = CollectiveRecord("all_to_all_rows", 5, "backward", [1], [1])
    with pytest.raises(RuntimeError), CommObserver(meter, flight_recorder, 5).waiting(failing):
        raise RuntimeError("connection closed by peer")
    assert flight_recorder.collective is not None and flight_recorder.collective.layer == 5
    flight_recorder.at("save")
    assert flight_recorder.collective is None


def test_each_moe_layer_has_an_observer_that_knows_its_layer() -> None:
    config = small_config()
    flight_recorder = FlightRecorder()
    model = build_model(config, 64, placement=ExpertPlacement(0, 1, ("ep",), flight_recorder=flight_recorder))
    layers = {
        layer: block.feed_forward.dispatcher.spec.observer
        for layer, block in enumerate(model.blocks)
        if layer in config.moe_layer_indices
    }
    assert (
        layers == {layer: CommObserver(None, flight_recorder, layer) for layer in config.moe_layer_indices} and layers
    )
    silent = build_model(config, 64, placement=ExpertPlacement(0, 1, ("ep",)))
    observers = [silent.blocks[layer].feed_forward.dispatcher.spec.observer for layer in layers]
    assert all(observer.meter is None and observer.flight_recorder is None for observer in observers)
