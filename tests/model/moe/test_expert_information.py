"""What the choice of experts tells of the tokens: against slow loops, dice, and choices whose answer is known."""

import math

import pytest
import torch

from moe_train.model.moe.expert_information import ChoiceCounts, TokenClasses, clean_kappa, expert_information
from moe_train.model.moe.routers.base import RouterOptions
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from tests.model.small import VOCAB, random_ids, small_config, small_model, tokens_of


def slow_information(joint: list[list[int]], top_k: int) -> float:
    """I(expert; class) / H(expert) of one table, by its definition."""
    total = sum(map(sum, joint))
    of_class, of_expert = [sum(row) for row in joint], [sum(column) for column in zip(*joint, strict=True)]
    information = sum(
        n / total * math.log(n * total / (of_class[c] * of_expert[e]))
        for c, row in enumerate(joint)
        for e, n in enumerate(row)
        if n
    )
    information -= (sum(map(bool, of_class)) - 1) * (len(of_expert) - top_k) / (2 * total)
    return information / -sum(n / total * math.log(n / total) for n in of_expert if n)


@pytest.mark.parametrize("top_k", [1, 2])
def test_information_is_that_of_its_definition(top_k: int) -> None:
    joint = torch.randint(0, 30, (3, 6, 4), generator=torch.Generator().manual_seed(0))
    joint[:, 2] = 0  # a class that does not occur
    found = expert_information(joint, top_k)
    assert found.tolist() == pytest.approx([slow_information(table.tolist(), top_k) for table in joint], abs=1e-12)


def test_information_of_a_choice_by_the_id_is_one_and_of_one_expert_zero() -> None:
    by_id = torch.zeros(8, 4, dtype=torch.int64)
    by_id[torch.arange(8), torch.arange(8) % 4] = 100_000
    assert expert_information(by_id, 1).item() == pytest.approx(1.0, abs=1e-4)
    one = torch.zeros(8, 4, dtype=torch.int64)
    one[:, 1] = 1000
    assert expert_information(one, 1).item() == 0.0


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (64, 8)])
def test_dice_have_no_information(num_experts: int, top_k: int) -> None:
    drawn = torch.Generator().manual_seed(1)
    experts_TK = torch.rand(60_000, num_experts, generator=drawn).topk(top_k).indices
    classes_T = (torch.rand(60_000, generator=drawn) ** 2 * 300).long()
    joint = torch.zeros(300 * num_experts, dtype=torch.int64)
    places_TK = classes_T[:, None] * num_experts + experts_TK
    joint.scatter_add_(0, places_TK.flatten(), torch.ones_like(places_TK.flatten()))
    assert abs(expert_information(joint.view(300, num_experts), top_k).item()) < 5e-4  # without the correction: 0.01


@pytest.mark.parametrize(("top_k", "least"), [(1, 64), (2, 32), (8, 32)])
def test_frequent_ids_have_classes_of_their_own(top_k: int, least: int) -> None:
    counts_V = torch.tensor([0, least, 5, least - 1, 1000, least])
    classes = TokenClasses.of(counts_V, top_k)
    assert classes.num_own == 3 and classes.class_V[[1, 4, 5]].tolist() == [0, 1, 2]
    shared = classes.class_V[[0, 2, 3]]
    assert (shared >= 3).all() and (shared < classes.num_classes).all()


def test_at_most_the_4096_most_frequent_ids_have_classes_of_their_own() -> None:
    counts_V = torch.arange(10_000).flip(0) + 100
    classes = TokenClasses.of(counts_V, 2)
    assert classes.num_own == 4096 and classes.class_V[:4096].tolist() == list(range(4096))
    shared = classes.class_V[4096:] - 4096
    assert shared.min() == 0 and shared.max() == 63
    assert shared.bincount().max() < 1.1 * len(shared) / 64  # the hash spreads them


@pytest.mark.parametrize("copies", [1, 2])
def test_counts_are_those_of_every_token_by_hand(copies: int) -> None:
    changes = {"hidden_copies": {"copies": copies, "window_positions": 2}} if copies > 1 else {}
    config = small_config(moe={"num_experts": 4, "top_k": 2, "router": "softmax_topk"}, **changes)
    model = small_model(config).eval()
    ids_BS = random_ids(3, 10)
    is_counted_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    is_counted_BS[2, 4:] = False
    classes = TokenClasses(torch.arange(VOCAB), VOCAB)
    counts = ChoiceCounts(model.routers, classes)
    chosen: list[list[list[int]]] = []
    hooks = [
        router.register_forward_hook(lambda module, inputs, routing: chosen.append(routing.experts_TK.tolist()))
        for router in model.routers
    ]
    with torch.no_grad():
        with counts.counting(ids_BS, is_counted_BS):
            model(tokens_of(ids_BS))
        for hook in hooks:
            hook.remove()
        model(tokens_of(ids_BS))  # outside of the block nothing is counted
    expected = torch.zeros_like(counts.joint_LCE)
    for layer, experts_TK in enumerate(chosen):
        for row in range(3):
            for copy in range(copies):
                for column in range(10):
                    if is_counted_BS[row, column]:
                        for expert in experts_TK[(row * copies + copy) * 10 + column]:
                            expected[layer, ids_BS[row, column], expert] += 1
    assert torch.equal(counts.reduced(None), expected)
    assert expected.sum() == len(model.routers) * copies * 24 * 2


@pytest.mark.parametrize("bias", [False, True])
def test_agreement_is_that_of_every_token_by_hand(bias: bool) -> None:
    options = RouterOptions(has_selection_bias=bias, optional_sums=frozenset({"agreement"}))
    router = NoisyTopKRouter(6, 5, 2, 1e-2, True, layer_key=3, options=options)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.gate.weight.normal_(generator=drawn)
        router.noise.weight.normal_(generator=drawn)
        if router.selection_bias is not None:
            router.selection_bias.copy_(torch.tensor([0.5, 0.0, -0.5, 1.0, 0.0]))
    x_TD, keys_T = torch.randn(200, 6, generator=drawn), torch.arange(200)
    routing = router.train()(x_TD, keys_T)
    clean_TK = router.eval()(x_TD, keys_T).experts_TK
    expected = sum(len({*a} & {*b}) for a, b in zip(routing.experts_TK.tolist(), clean_TK.tolist(), strict=True))
    assert routing.sums.agreement.item() == expected and 100 < expected < 400
    assert router(x_TD, keys_T).sums.agreement.item() == 0  # in evaluation there is no noise


def test_kappa_of_dice_is_zero_and_of_a_firm_choice_one() -> None:
    assert clean_kappa(torch.tensor([0.25, 1.0, 0.625]), 2, 8).tolist() == pytest.approx([0.0, 1.0, 0.5])
