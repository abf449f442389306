"""Compiled dense parts: the numbers, gradients and names of the model as it is, and how often anything is compiled."""

import pytest
import torch
from torch._dynamo.utils import counters

from moe_train.config.errors import UsageError
from moe_train.model.compiled import check_compiler, compile_dense_parts
from moe_train.model.moe.balance.base import Scheduled
from moe_train.model.moe.balance.cv_squared import SquaredVariation
from moe_train.model.objective import TrainingObjective
from moe_train.model.step_size import StepSize
from tests.model.small import random_ids, small_config, small_model, tokens_of

TERMS = (
    Scheduled(SquaredVariation(0.3, "importance", "micro_step")),
    Scheduled(SquaredVariation(0.2, "load", "micro_step")),
)
# Dense and MoE blocks, shared experts, layers that own keys and values and layers that read those below.
CONFIG = {"moe_every": 2, "kv_layers": 2, "moe": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1}}
NUM_PARTS = 5  # norm, keys and values, attention, SwiGLU of a dense layer [B, S, D], of shared experts [T, D]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled by another test is found, and none finds what this one leaves."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(recompute="none", **changes):
    return small_model(small_config(**{**CONFIG, **changes}), recompute=recompute)


def run(model, batch=2, length=7, documents=None):
    ids, targets = random_ids(batch, length), random_ids(batch, length, seed=1)
    model.train()
    model.zero_grad()
    losses = TrainingObjective(model, TERMS, None)(
        tokens_of(ids, documents_BS=documents, step=2), targets, StepSize.of_one_part(targets.numel())
    )
    losses.total.backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(result, expected):
    (losses, grads), (expected_losses, expected_grads) = result, expected
    torch.testing.assert_close(losses.total, expected_losses.total, rtol=1e-12, atol=0)
    assert torch.equal(losses.sums.counts, expected_losses.sums.counts)  # the same experts for every token
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        # fp64; sums are added in another order.
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-12, msg=name)
        assert grad.abs().max() > 1e-8, name


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("recompute", ["block", "attention", "experts"])
# aot_eager splits a graph into forward and backward as inductor does, and runs both without half a minute of g++.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_numbers_gradients_and_names_stay(backend, recompute):
    expected, model, recomputing = run(make()), make(), make(recompute=recompute)
    names = list(model.state_dict())
    compile_dense_parts(model, backend)
    compile_dense_parts(recomputing, backend)
    assert list(model.state_dict()) == names

    first = run(model)
    assert_same(first, expected)
    assert num_graphs() == NUM_PARTS and not counters["graph_break"], counters["graph_break"]

    # Both passes of a block that is computed again run what was compiled already: the very same numbers.
    losses, grads = run(recomputing)
    assert num_graphs() == NUM_PARTS
    assert torch.equal(losses.total, first[0].total) and torch.equal(losses.sums.load, first[0].sums.load)
    for name, grad in grads.items():
        # Gradients of several readers of keys and values are added in another order.
        torch.testing.assert_close(grad, first[1][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_position": "post", "norm": "layernorm"},
        {"num_kv_heads": 1, "kv_layers": 1, "sliding_window": 3},
        {"qk_norm": "head"},
        {"qk_norm": "projection", "num_kv_heads": 1},
        {"moe_every": 4, "kv_layers": 4, "tie_embeddings": True},
        {"moe_every": 1, "num_layers": 8, "moe": {"num_experts": 4, "top_k": 2}},
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_every_kind_of_model_is_traced_whole_and_every_part_once(changes, packed):
    documents = torch.tensor([[0] * 3 + [1] * 4]).expand(2, 7) if packed else None
    expected, model = run(make(**changes), documents=documents), make(**changes)
    compile_dense_parts(model, backend="eager")  # traces, and runs what it traced as it is
    assert_same(run(model, documents=documents), expected)
    assert not counters["graph_break"], counters["graph_break"]
    assert 0 < num_graphs() <= NUM_PARTS  # not more for more layers


@pytest.mark.parametrize("changes", [{}, {"hidden_copies": {"copies": 2, "window_positions": 2}}])
def test_other_documents_need_no_other_code(changes):
    """The number of documents is like a shape: the second one is compiled for, and with it all that follow."""
    changes = {"sliding_window": 3, "num_kv_heads": 1} | changes
    model, plain, found = make(**changes), make(**changes), []
    compile_dense_parts(model, backend="eager")
    for lengths in (
        [[130], [65, 65]],
        [[130], [1, 69, 60]],
        [[70, 60], [64, 66]],
        [[130], [130]],
        [[65, 65], [5, 125]],
    ):
        documents = torch.tensor([[n for n, count in enumerate(row) for _ in range(count)] for row in lengths])
        assert_same(run(model, 2, documents.shape[1], documents), run(plain, 2, documents.shape[1], documents))
        found.append(num_graphs())
    assert found[1] == found[0] and found[0] < found[2] == found[3] == found[4] <= found[0] + 2, found
    assert not counters["graph_break"]


@pytest.mark.parametrize("packed", [True, False])
def test_hidden_copies_are_traced_whole(packed):
    changes = {"hidden_copies": {"copies": 2, "window_positions": 2, "chunk": 3}, "kv_layers": 2}
    documents = torch.tensor([[0] * 3 + [1] * 4]).expand(2, 7) if packed else None
    expected, model = run(make(**changes), documents=documents), make(**changes)
    compile_dense_parts(model, backend="eager")
    assert_same(run(model, documents=documents), expected)
    assert not counters["graph_break"], counters["graph_break"]
    assert num_graphs() <= NUM_PARTS + 1  # the final norm sees one copy of each token: another shape


def test_a_second_shape_is_compiled_for_and_a_third_is_not():
    model, plain, found = make(), make(), []
    compile_dense_parts(model, backend="eager")
    for batch, length in ((2, 7), (2, 7), (3, 11), (5, 9), (4, 32), (2, 7)):
        assert_same(run(model, batch, length), run(plain, batch, length))
        found.append(num_graphs())
    assert found[:2] == [NUM_PARTS] * 2
    # The shared experts' rows were the second shape of a SwiGLU; the others are compiled once more, for all to come.
    assert found[2] <= 2 * NUM_PARTS and found[2:] == [found[2]] * 4
    assert not counters["graph_break"]


def test_evaluation_and_decoding_compile_nothing():
    model, plain, ids = make().eval(), make().eval(), random_ids(2, 6)
    compile_dense_parts(model)
    for each in (model, plain):
        each.cache = each.new_cache(2, 6)
    positions = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens_of(ids)).logits_BSV, plain(tokens_of(ids)).logits_BSV)
        for part in (slice(0, 5), slice(5, 6)):
            tokens = tokens_of(ids[:, part], positions_BS=positions[:, part])
            assert torch.equal(model(tokens, model.cache).logits_BSV, plain(tokens, plain.cache).logits_BSV)
    assert num_graphs() == 0


def test_a_compiler_that_is_not_there_is_said_in_one_line():
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}),
        pytest.raises(UsageError, match=r"train\.compile \(True\) needs a C\+\+ compiler .*/nowhere/g\+\+") as error,
    ):
        check_compiler(torch.device("cpu"))
    assert len(str(error.value).splitlines()) == 1


def test_a_compiler_that_is_there_is_found():
    check_compiler(torch.device("cpu"))
    assert num_graphs() == 1
