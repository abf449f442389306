"""While experts compute, the next chunk is on its way, and the one before on its way back; in the backward pass too."""

from typing import Any

import torch

from moe_train.distributed.flight_recorder import CollectiveRecord, FlightRecorder
from moe_train.distributed.mesh import create_mesh
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.parameters import materialize
from tests.model.small import context_of, small_config

VOCAB = 64
NUM_CHUNKS = 3


class Sky(FlightRecorder):
    """Which all-to-alls of rows are under way, and what was computed meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.in_flight = 0
        self.seen: list[tuple[str, int]] = []

    def start(self, collective: CollectiveRecord) -> None:
        super().start(collective)
        self.in_flight += collective.operation == "all_to_all_rows"

    def begin(self, collective: CollectiveRecord) -> None:
        super().begin(collective)
        self.in_flight -= collective.operation == "all_to_all_rows"

    def note(self, what: str) -> None:
        self.seen.append((what, self.in_flight))


def watch(module: torch.nn.Module, name: str, sky: Sky) -> None:
    """Note the module's forward pass, and the moment its backward pass begins."""

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        sky.note(name)
        output.register_hook(lambda grad: sky.note(f"{name} backward"))

    module.register_forward_hook(hook)


def compute(rank, world_size, num_chunks):
    mesh, sky = create_mesh(world_size, 60), Sky()
    moe = {"num_experts": 4, "top_k": 2, "num_shared_experts": 1}
    config = small_config(num_layers=1, moe_every=1, moe=moe)
    placement = ExpertPlacement(
        mesh.expert.rank, world_size, mesh.dispatch_groups, num_chunks=num_chunks, flight_recorder=sky
    )
    model = build_model(config, VOCAB, placement=placement)
    materialize(model, seed=0, dtype=torch.float64, device=torch.device("cpu"))
    layer = model.blocks[0].feed_forward
    watch(layer.experts, "experts", sky)
    watch(layer.shared, "shared", sky)
    x = torch.randn(2, 6, config.hidden_size, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, context_of(torch.arange(12).view(2, 6)))
    y.sum().backward()
    assert sky.in_flight == 0
    return sky.seen


def test_something_travels_while_something_is_computed(pool2):
    for seen in pool2.run(compute, NUM_CHUNKS, timeout=60):
        # A chunk is two all-to-alls on its way there, rows and gates, and one on its way back.
        forward = [("shared", 2), ("experts", 2), ("experts", 3), ("experts", 1)]
        assert seen[:4] == forward
        backward = [travelling for what, travelling in seen[4:] if what == "experts backward"]
        assert len(backward) == NUM_CHUNKS and all(travelling > 0 for travelling in backward[:-1])
        assert sorted(what for what, _ in seen[4:]) == ["experts backward"] * NUM_CHUNKS + ["shared backward"]


def test_in_one_chunk_only_the_shared_experts_hide_it(pool2):
    for seen in pool2.run(compute, 1, timeout=60):
        assert seen[:2] == [("shared", 2), ("experts", 0)]
