"""Settings of the Mixture-of-Experts layers: what must fit together, and what has no effect."""

import pytest
from pydantic import ValidationError

from moe_train.config.moe import MoEConfig

SIGMOID = {"router": "sigmoid_topk", "load_cv2_coef": 0}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({"top_k": 9}, ["top_k (9)", "num_experts (8)"], id="top_k above num_experts"),
        pytest.param({"top_k": 1}, ["top_k (1)", "renormalize_gates (True)", "learns nothing"], id="top-1 gate of 1"),
        pytest.param({"top_k": 8}, ["load_cv2_coef (0.1)", "top_k (8)", "num_experts (8)"], id="load with K = E"),
        pytest.param({"noise_epsilon": 0.0}, ["noise_epsilon", "0.0"], id="no least noise"),
        pytest.param(
            {"router": "softmax_topk", "load_cv2_coef": 0, "noise_epsilon": 0.1},
            ["noise_epsilon (0.1)", "softmax_topk"],
            id="noise without noise",
        ),
        pytest.param({"num_experts": 0}, ["num_experts"], id="no experts"),
        pytest.param({"importance_cv2_coef": -0.1}, ["importance_cv2_coef"], id="negative coefficient"),
        pytest.param(
            {"top_k": 1, "router": "switch", "renormalize_gates": True, "load_cv2_coef": 0},
            ["top_k (1)", "renormalize_gates (True)"],
            id="Switch with gates of 1",
        ),
        pytest.param({"router": "switch", "load_cv2_coef": 0}, ["'switch'", "top_k (2)", "1"], id="Switch of two"),
        pytest.param(SIGMOID | {"num_groups": 3}, ["num_experts (8)", "num_groups (3)"], id="groups do not divide"),
        pytest.param(SIGMOID | {"num_groups": 4}, ["num_groups (4)", "top_k_groups (None)"], id="which groups"),
        pytest.param(
            SIGMOID | {"num_groups": 4, "top_k_groups": 4}, ["num_groups (4)", "top_k_groups (4)"], id="all groups"
        ),
        pytest.param(SIGMOID | {"top_k_groups": 1}, ["top_k_groups (1)", "num_groups (1)"], id="groups of nothing"),
        pytest.param(
            SIGMOID | {"num_groups": 4, "top_k_groups": 1, "top_k": 3},
            ["top_k (3)", "2 experts", "top_k_groups (1)", "num_groups (4)"],
            id="more than the groups hold",
        ),
        pytest.param({"num_groups": 2, "top_k_groups": 1}, ["num_groups (2)", "noisy_topk"], id="groups of logits"),
        pytest.param({"routed_scaling_factor": 2.5}, ["routed_scaling_factor (2.5)", "noisy_topk"], id="scaled logits"),
        pytest.param({"capacity_factor": 0}, ["capacity_factor", "0"], id="no capacity"),
        pytest.param({"capacity_factor": -1}, ["capacity_factor", "-1"], id="negative capacity"),
        pytest.param({"eval_capacity_factor": 0}, ["eval_capacity_factor", "0"], id="no capacity in evaluation"),
        pytest.param({"drop_policy": "position"}, ["drop_policy ('position')", "capacity_factor"], id="drops of none"),
        pytest.param({"capacity_scope": "micro_batch"}, ["capacity_scope ('micro_batch')"], id="scope of none"),
        pytest.param({"input_jitter": 1.0}, ["input_jitter", "1"], id="jitter to zero"),
        pytest.param({"input_jitter": -0.1}, ["input_jitter", "-0.1"], id="negative jitter"),
        pytest.param({"num_shared_experts": -1}, ["num_shared_experts", "-1"], id="negative experts"),
        pytest.param({"switch_aux_coef": -0.1}, ["switch_aux_coef", "-0.1"], id="negative Switch loss"),
        pytest.param({"z_loss_coef": -0.1}, ["z_loss_coef", "-0.1"], id="negative z-loss"),
        pytest.param({"bias_update_rate": -0.1}, ["bias_update_rate", "-0.1"], id="negative rate"),
        pytest.param(
            {"switch_scope": "sequence"}, ["switch_scope ('sequence')", "switch_aux_coef"], id="scope of no loss"
        ),
        pytest.param(
            {"top_k": 8, "load_cv2_coef": 0, "switch_aux_coef": 0.1},
            ["switch_aux_coef (0.1)", "top_k (8)"],
            id="Switch, K = E",
        ),
        pytest.param(
            {"top_k": 8, "load_cv2_coef": 0, "bias_update_rate": 0.1},
            ["bias_update_rate (0.1)", "top_k (8)"],
            id="bias, K = E",
        ),
        pytest.param(
            {"balance_scope": "rank", "importance_cv2_coef": 0, "load_cv2_coef": 0, "switch_aux_coef": 0.1},
            ["balance_scope ('rank')"],
            id="scope of no CV",
        ),
        pytest.param(
            {"coef_schedules": {"z_loss_coef": [[0, 1]]}},
            ["coef_schedules.z_loss_coef", "z_loss_coef is 0"],
            id="schedule of 0",
        ),
        pytest.param(
            {"coef_schedules": {"load_cv2_coef": [[9, 1], [3, 0]]}},
            ["[[9, 1.0], [3, 0.0]]", "increasing"],
            id="steps go back",
        ),
        *(
            pytest.param(
                {"coef_schedules": {"load_cv2_coef": points}},
                [f"load_cv2_coef ({points!r})", "[step, factor]"],
                id=f"{points}",
            )
            for points in (
                [],
                [[0, -1]],
                [[-1, 1]],
                [[0]],
                [[0, 1, 2]],
                3,
                "x",
                [[True, 1]],
                [["3", 1]],
                [[0.5, 1]],
                [0, 1],
            )
        ),
        pytest.param({"coef_schedules": [[0, 1]]}, ["coef_schedules ([[0, 1]])", "names"], id="schedule of nothing"),
        pytest.param(
            {"coef_schedules": {"learning_rate": [[0, 1]]}}, ["learning_rate"], id="schedule of something else"
        ),
        pytest.param({"router": "hash"}, ["router"], id="unknown router"),
    ],
)
def test_moe_settings_that_contradict_or_have_no_effect(values, words):
    with pytest.raises(ValidationError) as error:
        MoEConfig(**values)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 1, "renormalize_gates": False},
        {"top_k": 8, "load_cv2_coef": 0.0},
        {"router": "softmax_topk", "load_cv2_coef": 0.0},
        {"num_experts": 1, "top_k": 1, "renormalize_gates": False, "load_cv2_coef": 0.0},
        {"noise_epsilon": 1e-6},
        {"router": "switch", "top_k": 1, "load_cv2_coef": 0.0},
        {"router": "switch", "top_k": 1, "load_cv2_coef": 0.0, "renormalize_gates": False},
        SIGMOID | {"num_groups": 4, "top_k_groups": 2, "routed_scaling_factor": 2.5, "bias_update_rate": 1e-3},
        {"capacity_factor": 1.25, "eval_capacity_factor": 2.0, "drop_policy": "position"},
        {"eval_capacity_factor": 2.0, "capacity_scope": "micro_batch"},
        {"switch_aux_coef": 0.01, "switch_scope": "sequence", "z_loss_coef": 1e-3, "bias_update_rate": 1e-3},
        {"coef_schedules": {"load_cv2_coef": [[0, 1], [100, 0]]}, "input_jitter": 0.01, "num_shared_experts": 2},
    ],
)
def test_moe_settings_that_are_right(values):
    MoEConfig(**values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"renormalize_gates": False}, False),
        ({"router": "switch", "top_k": 1, "load_cv2_coef": 0}, False),
        (SIGMOID, True),
    ],
)
def test_gates_sum_to_one_unless_it_is_switch_or_not_wanted(values, expected):
    assert MoEConfig(**values).gates_sum_to_one is expected


@pytest.mark.parametrize(
    ("values", "importance", "load"),
    [
        ({}, 0.1, 0.1),
        ({"router": "softmax_topk"}, 0.1, 0),
        ({"router": "sigmoid_topk", "bias_update_rate": 1e-3}, 0, 0),
        ({"switch_aux_coef": 0.01}, 0, 0),
        ({"switch_aux_coef": 0.01, "load_cv2_coef": 0.2}, 0, 0.2),
        ({"bias_update_rate": 0.0, "z_loss_coef": 1e-3}, 0.1, 0.1),
    ],
)
def test_cv_squared_balances_where_nothing_else_does(values, importance, load):
    moe = MoEConfig(**values)
    assert (moe.importance_cv2_coef, moe.load_cv2_coef) == (importance, load)
    assert MoEConfig(**moe.model_dump()) == moe  # the resolved configuration says the same


@pytest.mark.parametrize(("earlier", "now"), [("global", "micro_step"), ("local", "rank"), ("step", "step")])
def test_earlier_names_of_scopes_are_read(earlier: str, now: str) -> None:
    assert MoEConfig(balance_scope=earlier).balance_scope == now
