"""The decoder and its losses: recomputation, the stream hook, sums, and layouts of experts."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from moe_train.distributed.collectives import all_reduce_sum, group_size, world_group
from moe_train.distributed.mesh import create_mesh
from moe_train.model.build import ExpertPlacement
from moe_train.model.moe.balance.base import Scheduled
from moe_train.model.moe.balance.cv_squared import SquaredVariation, cv_squared
from moe_train.model.objective import TrainingObjective
from moe_train.model.parameters import ExpertParameter
from moe_train.model.step_size import StepSize
from moe_train.model.token_index import TokenIndex
from moe_train.ops.cross_entropy import IGNORED_TARGET
from tests.model.moe.balance.contexts import alone
from tests.model.small import VOCAB, random_ids, small_config, small_model, tokens_of

TERMS = (
    Scheduled(SquaredVariation(0.3, "importance", "micro_step")),
    Scheduled(SquaredVariation(0.2, "load", "micro_step")),
)
BATCH, LENGTH = 4, 7


def run_objective(model, tokens, targets, group=None):
    world_size, targets_of_all = group_size(group), (targets != IGNORED_TARGET).sum()
    num_targets = int(all_reduce_sum(targets_of_all.double(), group))
    size = StepSize(world_size, tokens.ids_BS.numel() * world_size, num_targets)
    losses = TrainingObjective(model, TERMS, group)(tokens, targets, size)
    losses.total.backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_every": 1},
        {"moe_every": 2, "kv_layers": 2},
        {"moe_layers": [0, 3], "kv_layers": 1, "norm_position": "post"},
        {"moe": {"num_experts": 4, "top_k": 2, "router": "softmax_topk", "load_cv2_coef": 0.0}},
        {"tie_embeddings": True},
    ],
)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("part", "every"), [("attention", 1), ("experts", 1), ("block", 1), ("block", 2)])
def test_recomputation_changes_nothing(changes, packed, part, every):
    ids, targets = random_ids(BATCH, LENGTH), random_ids(BATCH, LENGTH, seed=1)
    documents = torch.tensor([[0] * 3 + [1] * 4]).expand(BATCH, LENGTH) if packed else None
    config = small_config(**changes)
    results = []
    for recompute in ("none", part):
        model = small_model(config, recompute=recompute, recompute_every=every)
        results.append(run_objective(model, tokens_of(ids, documents_BS=documents, step=2), targets))
    (plain, grads), (recomputed, recomputed_grads) = results
    torch.testing.assert_close(recomputed.total, plain.total, rtol=0, atol=0)
    for field in ("importance", "load", "counts"):  # counted once
        assert torch.equal(getattr(recomputed.sums, field), getattr(plain.sums, field))
    moe_layers = len(config.moe_layer_indices)
    assert recomputed.sums.counts.sum(1).tolist() == [BATCH * LENGTH * 2] * moe_layers
    for name, grad in grads.items():
        # fp64; gradients of several readers are added in another order.
        torch.testing.assert_close(recomputed_grads[name], grad, rtol=1e-9, atol=1e-12, msg=name)
        assert grad.abs().max() > 1e-8, name


@pytest.mark.parametrize(
    ("part", "every", "mixers", "feed_forwards"),
    [
        ("none", 1, [3, 3, 3, 3], [3, 3, 3, 3]),
        ("attention", 1, [4, 4, 4, 4], [3, 3, 3, 3]),
        ("experts", 1, [3, 3, 3, 3], [4, 4, 4, 4]),
        ("block", 1, [4, 4, 4, 4], [4, 4, 4, 4]),
        ("block", 3, [3, 3, 4, 3], [3, 3, 4, 3]),
    ],
)
def test_what_is_recomputed_runs_twice(part, every, mixers, feed_forwards):
    """Only in training, only with gradients."""
    model = small_model(small_config(), recompute=part, recompute_every=every)
    calls = Counter()
    for layer, block in enumerate(model.blocks):
        for name in ("mixer_norm", "mixer", "feed_forward_norm", "feed_forward"):
            getattr(block, name).register_forward_hook(lambda *_, key=(name, layer): calls.update([key]))
    ids = random_ids(BATCH, LENGTH)
    run_objective(model, tokens_of(ids), ids)
    with torch.no_grad():
        model(tokens_of(ids))
    model.eval()(tokens_of(ids))
    for name, expected in (("mixer", mixers), ("feed_forward", feed_forwards)):
        for module in (name, f"{name}_norm"):
            assert [calls[module, layer] for layer in range(4)] == expected, module


def test_losses_add_up():
    model = small_model(small_config(moe_every=1))
    ids, targets = random_ids(BATCH, LENGTH), random_ids(BATCH, LENGTH, seed=1)
    targets[0, 3:] = IGNORED_TARGET
    losses, _ = run_objective(model, tokens_of(ids), targets)
    with torch.no_grad():
        output = model(tokens_of(ids))
    picked = [
        -output.logits_BSV[b, s].log_softmax(0)[targets[b, s]].item()
        for b in range(BATCH)
        for s in range(LENGTH)
        if targets[b, s] != IGNORED_TARGET
    ]
    assert len(picked) == BATCH * LENGTH - 4
    assert losses.cross_entropy.item() == pytest.approx(sum(picked) / len(picked), rel=1e-12)
    balance = 0.3 * cv_squared(losses.sums.importance).sum() + 0.2 * cv_squared(losses.sums.load).sum()
    assert balance > 0.01
    torch.testing.assert_close(losses.total, losses.cross_entropy + balance, rtol=1e-12, atol=0)  # fp64
    assert losses.sums.importance.shape == (4, 4)
    # Gates of a token add up to one, in every layer.
    torch.testing.assert_close(losses.sums.importance.sum(1), torch.full((4,), 28.0).double(), rtol=1e-12, atol=0)
    without = TrainingObjective(model, (), None)(tokens_of(ids), targets, StepSize.of_one_part(targets.numel()))
    assert torch.equal(without.total, without.cross_entropy)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"hidden_copies": {"copies": 2}}], ids=str)
def test_loss_by_chunks_of_tokens_changes_nothing(changes):
    model = small_model(small_config(**changes))
    ids, targets = random_ids(BATCH, LENGTH), random_ids(BATCH, LENGTH, seed=1)
    targets[0, 3:] = IGNORED_TARGET
    found = []
    for chunk in (None, 3, 1000):
        model.loss_chunk = chunk
        found.append(run_objective(model, tokens_of(ids), targets))
    (whole, grads), *others = found
    assert torch.equal(others[1][0].total, whole.total)  # a single chunk is what there was without chunks
    assert all(torch.equal(grad, grads[name]) for name, grad in others[1][1].items())
    torch.testing.assert_close(others[0][0].total, whole.total, rtol=1e-13, atol=0)  # fp64
    for name, grad in others[0][1].items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-9, atol=1e-13, msg=name)
    model.eval()
    with torch.no_grad():
        losses = [model(tokens_of(ids), targets_BS=targets).losses_BS for model.loss_chunk in (3, None)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-13)
    assert losses[0].shape == targets.shape and not losses[0][0, 3:].any()


def test_a_model_without_moe_layers_has_no_sums():
    model = small_model(small_config(moe_every=0, moe={}))
    ids = random_ids(BATCH, LENGTH)
    losses, _ = run_objective(model, tokens_of(ids), ids)
    assert losses.sums is None
    assert torch.equal(losses.total, losses.cross_entropy)


def test_a_sequence_is_the_same_in_any_batch():
    """Router noise is keyed by the global index of the sequence."""
    model = small_model(small_config(moe_every=1)).train()
    ids = random_ids(BATCH, LENGTH)
    tokens = tokens_of(ids, step=4)
    whole = model(tokens)
    order = torch.tensor([2, 0, 3])
    part = model(replace(tokens, ids_BS=ids[order], sequences_B=order))
    torch.testing.assert_close(part.logits_BSV, whole.logits_BSV[order], rtol=0, atol=1e-10)  # fp64
    other_step = model(replace(tokens, step=5))
    assert not torch.allclose(other_step.logits_BSV, whole.logits_BSV)
    other_sequences = model(replace(tokens, sequences_B=torch.arange(BATCH) + 50))
    assert not torch.allclose(other_sequences.logits_BSV, whole.logits_BSV)
    other_seed = small_model(small_config(moe_every=1)).train()
    other_seed.load_state_dict(model.state_dict())
    torch.testing.assert_close(other_seed(tokens).logits_BSV, whole.logits_BSV, rtol=0, atol=0)
    seeded = small_model(small_config(moe_every=1), seed=1).train()
    seeded.load_state_dict(model.state_dict())
    assert not torch.allclose(seeded(tokens).logits_BSV, whole.logits_BSV)


class Repeat:
    """Every token twice; the last copy predicts."""

    def expand(self, x_BSD, context):
        def double(tensor):
            return None if tensor is None else tensor.repeat_interleave(2, dim=1)

        own = context.tokens
        tokens = TokenIndex(*map(double, (own.positions_BS, own.offsets_BS, own.documents_BS, own.keys_BS)))
        return double(x_BSD), replace(context, tokens=tokens)

    def contract(self, x_BSD, context):
        assert context.tokens.positions_BS.shape[1] == x_BSD.shape[1]
        return x_BSD[:, 1::2]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("recompute", ["none", "attention", "experts", "block"])
def test_stream_hook_expands_below_and_contracts_above_the_blocks(packed, recompute):
    model = small_model(small_config(kv_layers=2), recompute=recompute)
    ids = random_ids(BATCH, LENGTH)
    documents = torch.tensor([[0] * 3 + [1] * 4]).expand(BATCH, LENGTH) if packed else None
    plain = model(tokens_of(ids, documents_BS=documents)).logits_BSV
    twice = {
        "positions_BS": torch.arange(LENGTH).repeat_interleave(2)[None],
        "documents_BS": documents.repeat_interleave(2, dim=1) if packed else None,
    }
    expected = model(tokens_of(ids.repeat_interleave(2, dim=1), **twice))
    model.stream_hook = Repeat()
    output = model(tokens_of(ids, documents_BS=documents))
    assert output.logits_BSV.shape == (BATCH, LENGTH, VOCAB)
    torch.testing.assert_close(output.logits_BSV, expected.logits_BSV[:, 1::2], rtol=0, atol=1e-12)  # fp64
    assert torch.equal(output.sums.counts, expected.sums.counts)
    assert output.sums.counts.sum(1).tolist() == [2 * BATCH * LENGTH * 2] * 2  # every copy is routed
    # Keys are masked by position: both copies see both copies, which changes no average.
    torch.testing.assert_close(output.logits_BSV, plain, rtol=0, atol=1e-12)
    output.logits_BSV.sum().backward()
    assert model.blocks[0].mixer.key.weight.grad.abs().max() > 1e-8


def run_share(rank, world_size, ep_size, recompute):
    """Losses and gradients of this rank's part of the batch, with experts spread over ep_size ranks."""
    placement = None
    if world_size > 1:
        mesh = create_mesh(ep_size, timeout_seconds=60)
        placement = ExpertPlacement(mesh.expert.rank, ep_size, mesh.dispatch_groups)
    model = small_model(small_config(kv_layers=2, moe_every=2), placement=placement, recompute=recompute)
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    ids, targets = random_ids(BATCH, LENGTH)[share], random_ids(BATCH, LENGTH, seed=1)[share]
    tokens = replace(tokens_of(ids, step=1), sequences_B=torch.arange(BATCH)[share])
    losses, grads = run_objective(model, tokens, targets, world_group())
    starts = {n: p.first_expert for n, p in model.named_parameters() if isinstance(p, ExpertParameter)}
    scalars = losses.total.detach(), losses.cross_entropy.detach()
    return *scalars, losses.sums.counts, grads, starts


@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("recompute", ["none", "attention", "experts", "block"])
def test_every_layout_equals_one_process(world_size, ep_size, recompute, request):
    total, cross_entropy, counts, grads, _ = run_share(0, 1, 1, recompute)
    results = request.getfixturevalue(f"pool{world_size}").run(run_share, ep_size, recompute, timeout=60)
    # fp64; sums over ranks are added in another order.
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(sum(result[0] for result in results) / world_size, total, **close)
    torch.testing.assert_close(sum(result[1] for result in results) / world_size, cross_entropy, **close)
    assert torch.equal(sum(result[2] for result in results), counts)
    for name, grad in grads.items():
        if ".experts." not in name:
            averaged = sum(result[3][name] for result in results) / world_size
        else:  # a rank's experts have all gradients of its group's tokens
            averaged = torch.zeros_like(grad)
            for result in results:
                first = result[4][name]
                averaged[first : first + 4 // ep_size] += result[3][name] / world_size
        torch.testing.assert_close(averaged, grad, **close, msg=name)


def test_weights_follow_their_schedules_by_the_step_of_the_tokens():
    model = small_model(small_config(moe_every=1))
    ids = random_ids(BATCH, LENGTH)
    term, points = SquaredVariation(0.3, "importance", "micro_step"), ((2, 1.0), (6, 3.0))
    other = SquaredVariation(0.2, "load", "micro_step")
    objective = TrainingObjective(model, (Scheduled(term, points), Scheduled(other)), None)
    for step, factor in ((0, 1.0), (2, 1.0), (3, 1.5), (5, 2.5), (9, 3.0)):
        losses = objective(tokens_of(ids, step=step), ids, StepSize.of_one_part(ids.numel()))
        value = term.loss(losses.sums, alone(losses.sums))
        expected = losses.cross_entropy + factor * value + other.loss(losses.sums, alone(losses.sums))
        assert value > 0.01
        torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)  # fp64
