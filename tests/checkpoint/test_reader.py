"""The reader of checkpoints: whose moments it takes."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_train.checkpoint.manifest import read_manifest
from moe_train.checkpoint.reader import load_checkpoint
from moe_train.checkpoint.sharded_state import Fragment
from moe_train.model.parameters import LogicalTensor
from tests.checkpoint.made import SHAPES, make_checkpoint


class OneProcess:
    """A training state of one process, which owns everything."""

    def __init__(self, optimizer: str, moments: tuple[str, ...]) -> None:
        self.optimizer, self.moments, self.step = optimizer, moments, -1
        self.logical_tensors = [
            LogicalTensor(name, shape, 0, math.prod(shape), is_expert=False) for name, shape in SHAPES.items()
        ]
        kinds = ("weight", *moments)
        self.states = {t.name: {kind: torch.full((t.numel,), -1.0) for kind in kinds} for t in self.logical_tensors}

    def fragments(self) -> Iterator[Fragment]:
        for tensor in self.logical_tensors:
            yield Fragment(tensor, 0, tensor.numel, self.states[tensor.name])

    def read_state(self, read: Callable[[Fragment, str], Tensor]) -> None:
        for fragment in self.fragments():
            for kind, state in fragment.states.items():
                state.copy_(read(fragment, kind))

    def adopt_state(self, optimizer_step: int, loss_scale: float | None) -> None:
        self.step = optimizer_step

    def buffers(self) -> dict[str, Tensor]:
        return {"router.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("optimizer", "moments", "takes"),
    [
        ("adamw", ("exp_avg", "exp_avg_sq"), True),
        ("other", ("exp_avg", "exp_avg_sq"), False),
        ("other", ("exp_avg",), False),
        ("other", ("exp_avg", "exp_inf"), False),
    ],
)
def test_moments_are_those_of_the_same_optimizer_or_zero(
    tmp_path: Path, optimizer: str, moments: tuple[str, ...], takes: bool
) -> None:
    manifest = read_manifest(make_checkpoint(tmp_path, step=7, optimizer_step=7))
    state = OneProcess(optimizer, moments)
    load_checkpoint(state, manifest)
    assert state.step == (7 if takes else 0)
    for states in state.states.values():
        assert (states["weight"] != -1).all()
        for name in moments:
            assert not (states[name] == -1).any()
            assert bool(states[name].any()) == (takes and bool(states[name].numel()))
