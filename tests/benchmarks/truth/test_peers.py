"""The peers of the truth benchmark: they have this project's start weights, and one of them really trains."""

from pathlib import Path

import pytest
import torch

from benchmarks.runner.resolved import resolve_for
from benchmarks.train.peers import build_mixtral
from benchmarks.train.rows import OURS
from benchmarks.truth.cases import AUTOEP, OPTIONS, read_case
from benchmarks.truth.peers import name_experts, start_weights
from benchmarks.truth.rows import OTHER, SAME, judge
from benchmarks.truth.systems import Systems
from moe_train.config.load import load_config

needs_transformers = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("transformers"),
    reason="an optional extra: pip install -c requirements/constraints.txt '.[hf]'",
)


def test_experts_have_names_that_do_not_depend_on_the_rank() -> None:
    parts = [torch.zeros(2, 3), torch.ones(2, 3)]
    assert torch.equal(name_experts("mlp.experts.w1", parts, 0)["mlp.experts.w1"], torch.cat(parts))
    named = name_experts("mlp.deepspeed_experts.1.down.weight", parts, num_local=2)
    assert list(named) == ["mlp.deepspeed_experts.1.down.weight", "mlp.deepspeed_experts.3.down.weight"]


@needs_transformers
def test_start_weights_fill_mixtral() -> None:
    given = [*OPTIONS, "--train.run_dir=run", "--train.micro_batch_size=2", "--train.global_batch_size=2"]
    config = resolve_for(load_config(given, program="test"), 1)
    model = build_mixtral(config.model, config.train.sequence_length, "eager")
    model.load_state_dict(start_weights(config))  # strict: every name, every shape
    assert model.model.layers[1].mlp.gate.weight.std().item() == pytest.approx(0.1, rel=0.1)


@needs_transformers
@pytest.mark.slow
def test_systems_agree_and_a_known_failure_is_seen(tmp_path: Path) -> None:
    reference, averaged = read_case("1x1z1a1"), read_case("2x2z0a1")
    with Systems(tmp_path) as systems:
        ours, theirs = (systems.run(system, reference, "plain") for system in (OURS, AUTOEP))
        # The same weights, tokens and optimizer: the same losses, also between systems.
        for mine, other in zip(ours.records, theirs.records, strict=True):
            assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=1e-6)
        same = judge(AUTOEP, read_case("2x2z1a1"), "plain", systems.run(AUTOEP, read_case("2x2z1a1"), "plain"), theirs)
        assert same.kind == SAME
        found = judge(AUTOEP, averaged, "plain", systems.run(AUTOEP, averaged, "plain"), theirs)
        assert found.kind == OTHER and "gradient norm" in found.beyond
