"""Measuring a model on text: against a loop over tokens, and the same on any number of ranks."""

import math

import numpy as np
import pytest
import torch

from moe_train.data import Domain, HeldOut
from moe_train.distributed.collectives import world_group
from moe_train.distributed.mesh import create_mesh
from moe_train.infer.evaluate import EvaluationPlan, chosen_sequences, evaluate, joined
from moe_train.model.transformer import Tokens
from tests.model.small import VOCAB, ExpertPlacement, small_config, small_model

LENGTH, MARK = 6, 5
CPU = torch.device("cpu")


def domain(num_tokens, seed=0, name="text"):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, num_tokens)
    return Domain(name, HeldOut(tokens, LENGTH, MARK, 3, 2 * num_tokens, {}))


def by_definition(model, text, isolates):
    """Loss and expert counts, sequence by sequence."""
    loss, tokens = 0.0, text.tokens
    counts = torch.zeros(len(model.routers), 4, dtype=torch.int64)
    for start in range(0, len(tokens) - 1, LENGTH):
        piece = torch.from_numpy(tokens[start : start + LENGTH + 1])
        ids = piece[None, :-1]
        documents = (ids == MARK).cumsum(1) if isolates else None
        sequence = torch.tensor([start // LENGTH])
        with torch.no_grad():
            output = model(Tokens(ids, sequence, documents_BS=documents))
        for place, target in enumerate(piece[1:].tolist()):
            loss -= float(output.logits_BSV[0, place].log_softmax(0)[target])
        counts += output.sums.counts
    return loss, counts.tolist()


@pytest.mark.parametrize("num_tokens", [LENGTH * 5 + 1, LENGTH * 5 + 3, 4], ids=str)
@pytest.mark.parametrize("isolates", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_against_the_definition(num_tokens, isolates, batch_size):
    model = small_model(small_config(moe_every=2)).eval()
    text = domain(num_tokens)
    (found,) = evaluate(model, [text], EvaluationPlan(batch_size, None, MARK if isolates else None), CPU)
    loss, counts = by_definition(model, text.text, isolates)
    assert found.loss_sum == pytest.approx(loss, rel=1e-12)  # fp64
    assert [list(layer) for layer in found.counts] == counts
    assert found.tokens == num_tokens - 1
    assert found.loss == pytest.approx(loss / (num_tokens - 1))
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.num_bytes == 2 * num_tokens
    assert found.bits_per_byte == pytest.approx(loss / math.log(2) / (2 * num_tokens))


def test_training_mode_and_noise_play_no_part():
    model = small_model(small_config(moe={"num_experts": 4, "router": "noisy_topk"})).train()
    plan = EvaluationPlan(2)
    first, second = (evaluate(model, [domain(40)], plan, CPU)[0] for _ in range(2))
    assert first == second


def test_some_sequences_are_spread_over_the_text():
    assert chosen_sequences(10, None).tolist() == list(range(10))
    assert chosen_sequences(10, 4).tolist() == [0, 2, 5, 7]
    assert chosen_sequences(3, 9).tolist() == [0, 1, 2]
    model, text = small_model(small_config()), domain(LENGTH * 10 + 1)
    (found,) = evaluate(model, [text], EvaluationPlan(3, 4), CPU)
    assert found.sequences == 4 and found.tokens == 4 * LENGTH
    assert found.num_bytes == pytest.approx(text.text.num_bytes * 0.4)


def test_domains_add_up():
    model = small_model(small_config())
    both = evaluate(model, [domain(25), domain(40, seed=1)], EvaluationPlan(4), CPU)
    whole = joined(both)
    assert whole.tokens == 24 + 39
    assert whole.loss_sum == pytest.approx(both[0].loss_sum + both[1].loss_sum)
    assert sum(map(sum, whole.counts)) == 2 * len(model.routers) * whole.tokens
    assert whole.max_violation == max(max(whole.shares(layer)) for layer in range(len(whole.counts))) - 1


def test_capacity_is_of_each_sequence():
    moe = {"num_experts": 4, "top_k": 2, "eval_capacity_factor": 0.5}
    model, text = small_model(small_config(moe=moe)), domain(LENGTH * 7 + 1)
    one, three = (evaluate(model, [text], EvaluationPlan(size), CPU)[0] for size in (1, 3))
    assert one.counts == three.counts and one.dropped == three.dropped
    assert 0.4 < one.dropped_fraction < 0.8


def test_a_model_without_experts():
    model = small_model(small_config(moe_every=0, moe={}))
    (found,) = evaluate(model, [domain(20)], EvaluationPlan(4), CPU)
    assert found.counts == () and found.max_violation is None and found.dropped_fraction == 0
    assert found.as_dict(())["experts"] == []


def measure(rank, world_size, ep_size):
    torch.set_num_threads(1)
    mesh = create_mesh(ep_size, 60)
    placement = ExpertPlacement(mesh.expert.rank, ep_size, mesh.dispatch_groups)
    model = small_model(small_config(moe_every=1), placement=placement)
    # Five batches, one of them cut short: on two and on four ranks some have none at the end.
    return evaluate(model, [domain(LENGTH * 8 + 3), domain(9, 1, "few")], EvaluationPlan(2), CPU, world_group())


def test_same_on_ranks(pool4):
    torch.set_num_threads(1)
    model = small_model(small_config(moe_every=1))
    alone = evaluate(model, [domain(LENGTH * 8 + 3), domain(9, 1, "few")], EvaluationPlan(2), CPU)
    for ep_size in (1, 2, 4):
        for found in pool4.run(measure, ep_size):
            if ep_size == 1:
                assert found == alone  # to the last bit
            for ours, theirs in zip(found, alone, strict=True):
                assert ours.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-12)  # fp64
                assert ours.counts == theirs.counts
