"""A slice of the parity benchmark: balance terms, routers and layouts in real engines; and faults that it must see."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.parity.rows import (
    ACCUMULATIONS,
    GLOBAL_BATCH,
    REFERENCE,
    Case,
    Comparison,
    Layout,
    Task,
    Trace,
    all_routers,
    cases_of,
    compare,
    compare_all,
    product,
    train_all,
)
from moe_train.config.load import load_config
from moe_train.config.registry import load_part, part_names
from moe_train.model.moe.balance.build import balance_kinds
from tests.train.runs import fork_server

NUM_STEPS = 5
# Every router, every number of ranks, accumulation, EP size and ZeRO stage, and every term at least once.
SLICE = (
    Task(Case("noisy_topk", "all"), Layout(1, 1, 1, 16)),
    Task(Case("noisy_topk", "all"), Layout(2, 2, 2, 4)),
    Task(Case("noisy_topk", "all"), Layout(4, 2, 3, 4)),
    Task(Case("noisy_topk", "importance"), Layout(4, 2, 3, 16)),
    Task(Case("noisy_topk", "load"), Layout(4, 2, 3, 2)),
    Task(Case("softmax_topk", "switch"), Layout(2, 2, 2, 16)),
    Task(Case("softmax_topk", "sequence"), Layout(2, 2, 2, 2)),
    Task(Case("sigmoid_topk", "bias"), Layout(4, 4, 1, 4)),
    Task(Case("switch", "all"), Layout(4, 4, 1, 2)),
    Task(Case("noisy_topk", "importance of a micro-step"), Layout(4, 4, 1, 1)),
)
RIGHT = Task(Case("noisy_topk", "importance"), Layout(1, 1, 1, 2))
FAULTS = {
    "parts": replace(RIGHT, parts_factor=2),
    # A number of tokens that is wrong by the same factor in every step cancels in CV^2, which sees no scale, but not
    # in the Switch loss; test_over_steps.py has one that is wrong in one step.
    "tokens": replace(RIGHT, case=Case("noisy_topk", "switch"), tokens_factor=2),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Comparison]:
    """The slice, compared with one process."""
    found = compare_all(SLICE, tmp_path_factory.mktemp("slice"), NUM_STEPS, server=fork_server())
    return {each.task: each for each in found}


@pytest.mark.slow
@pytest.mark.parametrize("task", SLICE, ids=lambda task: task.name)
def test_every_layout_has_the_same_objective(compared: dict[Task, Comparison], task: Task) -> None:
    found = compared[task]
    assert found.loss <= 1e-4 and found.norm <= 1e-3 and found.gradient <= 1e-3, found
    assert found.passed


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Trace]:
    """Runs with a wrong size, and right ones."""
    tasks = [*FAULTS.values(), *(Task(each.case, REFERENCE) for each in FAULTS.values())]
    return dict(train_all(tasks, tmp_path_factory.mktemp("faults"), fork_server(), 2))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_size_wrong_by_two_is_found_by_the_gradient_and_not_by_what_is_logged(
    faulty: dict[Task, Trace], fault: str
) -> None:
    task = FAULTS[fault]
    found, right = faulty[task], faulty[Task(task.case, REFERENCE)]
    assert not compare(task, found, right).passed
    # Of the two steps the second is the first with a term. What is logged of it was there before its gradient.
    np.testing.assert_allclose(found.losses, right.losses, rtol=1e-6)  # fp32 sums in another order
    np.testing.assert_allclose(found.cv2, right.cv2, rtol=1e-5)
    (name,) = (name for name in right.gradients if name.endswith("gate.weight"))
    apart = np.linalg.norm(found.gradients[name] - right.gradients[name], axis=1)
    own = np.linalg.norm(right.gradients[name], axis=1)
    assert apart[0] <= 1e-5 * own[0] and apart[1] > 0.1 * own[1]


def test_the_terms_act(faulty: dict[Task, Trace]) -> None:
    # Of E = 8 experts and K = 2, all tokens on the same two give 3; a router that starts at zero has about 0.002.
    assert all(trace.cv2[0] > 0.05 for trace in faulty.values())


def test_the_product_hides_nothing() -> None:
    tasks = product(all_routers())
    assert set(all_routers()) == set(part_names("routers"))
    assert {(t.layout.world_size, t.layout.accumulation) for t in tasks} == {
        (ranks, accumulation) for ranks in (1, 2, 4) for accumulation in ACCUMULATIONS
    }
    assert all(GLOBAL_BATCH % (t.layout.world_size * t.layout.accumulation) == 0 for t in tasks)
    together = {t.layout for t in tasks if t.case == Case("noisy_topk", "all")}
    assert len(together) == 18 * 4  # ranks x EP x ZeRO, and accumulations
    for case in cases_of(all_routers()):
        own = {t.layout for t in tasks if t.case == case}
        assert {layout.world_size for layout in own} == {1, 2, 4} and REFERENCE in own
        expected = {1} if "micro-step" in case.name else set(ACCUMULATIONS)
        assert {layout.accumulation for layout in own} == expected


def test_all_means_every_way_to_balance() -> None:
    config = load_config([*Case("noisy_topk", "all").options(), "--train.run_dir=unused"], program="t")
    kinds = {load_part("balance", name).field for name in part_names("balance")}
    assert {name for name, _, _ in balance_kinds(config.model.moe)} == kinds
    alone = [
        {
            name
            for name, _, _ in balance_kinds(load_config([*case.options(), "--train.run_dir=u"], program="t").model.moe)
        }
        for case in cases_of(["noisy_topk"])
        if case.term != "all"
    ]
    assert all(len(names) == 1 for names in alone) and set().union(*alone) == kinds


def test_a_number_that_is_not_finite_is_not_alike() -> None:
    trace = Trace(np.ones(3), np.ones(3), np.ones(3), {"m": np.ones((3, 4))})
    assert compare(RIGHT, trace, trace).passed
    assert not compare(RIGHT, replace(trace, losses=np.array([1, np.nan, 1])), trace).passed
    assert not compare(RIGHT, replace(trace, gradients={"m": np.full((3, 4), np.inf)}), trace).passed
    assert not compare(RIGHT, replace(trace, norms=np.array([1, 1, 1.002])), trace).passed
