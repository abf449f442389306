"""The search: what it proposes fits, is no slower than what was asked, keeps the global batch and can be loaded."""

import pytest
import yaml

from moe_train.config.load import dump_yaml, validate_config
from moe_train.config.root import check_world
from moe_train.plan.devices import DEVICES
from moe_train.plan.layout import Cluster
from moe_train.plan.planner import Question, make_plan
from moe_train.plan.search import apply_layout, search
from tests.plan.cases import LARGE, SMALL, config_of


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (4, 8), (2, 4)])
def test_the_best_is_fast_fits_and_loads(nodes: int, gpus: int) -> None:
    config = config_of(LARGE, parallel__zero_stage=3, train__recompute_activations=True)
    question = Question(Cluster(nodes, gpus, DEVICES["h100"]), margin=0.05)
    found = search(config, 32000, question)
    chosen = apply_layout(config, found.best[0].layout)
    loaded = validate_config(yaml.safe_load(dump_yaml(chosen)))
    resolved = check_world(loaded, nodes * gpus, gpus)
    assert resolved.train.global_batch_size == 256
    plan, asked = make_plan(loaded, 32000, question), make_plan(config, 32000, question)
    assert plan.fits and plan.step.seconds <= asked.step.seconds
    assert plan.step.seconds == pytest.approx(found.best[0].step.seconds)
    assert plan.memory.total == pytest.approx(found.best[0].memory.total)
    times = [candidate.step.seconds for candidate in found.best]
    assert times == sorted(times) and found.tried > len(times) / 2


def test_every_candidate_fits_with_its_margin() -> None:
    question = Question(Cluster(1, 8, DEVICES["h100"]), margin=0.3)
    found = search(config_of(LARGE), 32000, question)
    assert found.best and all(each.memory.total <= 0.7 * 80e9 for each in found.best)


def test_a_model_without_experts() -> None:
    dense = {name: value for name, value in SMALL.items() if ".moe." not in name}
    config = config_of(dense | {"model.moe_every": 0}, train__global_batch_size=16)
    found = search(config, 512, Question(Cluster(1, 2, DEVICES["a100"])))
    assert {each.layout.ep_size for each in found.best} == {1}


def test_nothing_fits() -> None:
    small = DEVICES["h100"].model_copy(update={"memory_bytes": 2**30})
    found = search(config_of(LARGE), 32000, Question(Cluster(1, 8, small)))
    assert found.best == () and found.smallest.total > 2**30
