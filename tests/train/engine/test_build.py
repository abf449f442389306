"""From a configuration to the parts of a run: what is configured is what is built."""

import pytest
import torch

from moe_train.config.load import validate_config
from moe_train.distributed.mesh import MeshGroup, ParallelMesh
from moe_train.model.build import ExpertPlacement
from moe_train.train.engine import build
from tests.resolved import resolve_for


class Built(Exception):
    """In place of a model."""


def test_how_tokens_travel(monkeypatch):
    asked = []

    def create_mesh(ep_size, timeout_seconds, node_size, context_size):
        asked.append((ep_size, node_size, context_size))
        expert, alone = MeshGroup("ep", (0, 1, 2, 3), 1), MeshGroup("edp", (1,), 0)
        nodes = (MeshGroup(name, (0, 1), 1) for name in ("across", "within"))
        return ParallelMesh(expert, expert, alone, *nodes)

    def build_model(model, vocab_size, *, placement: ExpertPlacement, **_):
        raise Built(placement)

    monkeypatch.setattr(build, "create_mesh", create_mesh)
    monkeypatch.setattr(build, "build_model", build_model)
    parallel = {"dispatch": "two_level", "expert_parallel_size": 4, "chunks": 3, "payload": "fp8"}
    sections = {"parallel": parallel, "train": {"run_dir": "r", "precision": "fp32"}, "model": {"vocab_size": 64}}
    config = resolve_for(validate_config(sections), 4, 2)
    with pytest.raises(Built) as built:
        build.make_engine(config, torch.device("cpu"))
    assert asked == [(4, 2, None)]
    assert built.value.args == (ExpertPlacement(1, 4, ("across", "within"), "two_level", 3, "fp8"),)
