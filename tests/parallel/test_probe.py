"""Where a process is, as its all-to-alls tell it."""

import pytest
import torch

from moe_train.model.build import ExpertPlacement, build_model
from moe_train.parallel.all_to_all import Splits, start_counts, start_rows
from moe_train.parallel.collectives import world_group
from moe_train.parallel.position import Exchange, Position
from moe_train.parallel.probe import Probe
from moe_train.parallel.traffic import TrafficMeter
from tests.model.small import small_config


class Listening(Position):
    """Keeps every all-to-all that was noted, and whether each was left."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict] = []
        self.num_left = 0

    def begin(self, exchange) -> None:
        super().begin(exchange)
        self.seen.append(self.as_dict()["exchange"])

    def end(self) -> None:
        super().end()
        self.num_left += 1


def exchange_twice(rank, world_size):
    position, group = Listening(), world_group()
    probes = [Probe(position=position, layer=layer) for layer in (1, 3)]
    rows = torch.ones(3, 2, requires_grad=True)
    send, receive = ([1, 2], [1, 1]) if rank == 0 else ([1, 2], [2, 2])
    splits = Splits(tuple(send), tuple(receive))
    start_counts(torch.ones(2, 4, dtype=torch.int64), group, probes[0]).wait()
    arrived = start_rows(rows, splits, group, probes[0]).wait()
    back = start_rows(arrived, splits.back, group, probes[1]).wait()
    back.sum().backward()
    return position.seen, position.num_left, position.describe()


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
        assert [tuple(exchange.values()) for exchange in seen] == expected
        assert num_left == len(expected)
        last = f"all_to_all_rows of layer 1, backward: send {receive}, receive {send}"
        assert text == f"phase start, in no all-to-all; the last was {last}"


def test_a_position_in_words_and_as_plain_values() -> None:
    position = Position()
    assert position.describe() == "phase start"
    position.at("forward", 7)
    assert position.describe() == "step 7, phase forward"
    probe = Probe(position=position, layer=2)
    started = Exchange("all_to_all_rows", 2, "forward", (4, 0), (1, 2))
    with probe.starting(started, 10):
        pass
    text = "all_to_all_rows of layer 2, forward: send [4, 0], receive [1, 2]"
    assert position.describe() == f"step 7, phase forward, in no all-to-all; the last was {text}"
    with probe.waiting(started):
        exchange = "all_to_all_rows of layer 2, forward: send [4, 0], receive [1, 2]"
        assert position.describe() == f"step 7, phase forward, in {exchange}"
    place = position.as_dict()
    assert place["exchange"] is None and place["last_exchange"]["receive"] == [1, 2]
    moves = position.num_moves
    position.at("update")
    assert (position.step, position.phase) == (7, "update") and position.num_moves > moves


def test_after_an_error_the_note_stays_until_the_next_phase() -> None:
    position, meter = Position(), TrafficMeter(torch.device("cpu"))
    failing = Exchange("all_to_all_rows", 5, "backward", [1], [1])
    with pytest.raises(RuntimeError), Probe(meter, position, 5).waiting(failing):
        raise RuntimeError("connection closed by peer")
    assert position.exchange is not None and position.exchange.layer == 5
    position.at("save")
    assert position.exchange is None


def test_each_moe_layer_has_a_probe_that_knows_its_layer() -> None:
    config = small_config()
    position = Position()
    model = build_model(config, 64, placement=ExpertPlacement(position=position))
    layers = {
        layer: block.feed_forward.dispatcher.probe
        for layer, block in enumerate(model.blocks)
        if layer in config.moe_layer_indices
    }
    assert layers == {layer: Probe(None, position, layer) for layer in config.moe_layer_indices} and layers
    silent = build_model(config, 64)
    probes = [silent.blocks[layer].feed_forward.dispatcher.probe for layer in layers]
    assert all(probe.meter is None and probe.position is None for probe in probes)
