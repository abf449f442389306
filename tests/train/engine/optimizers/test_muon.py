"""Muon on flat partitions against a loop over matrices in fp64, whole and in ranges as two ranks have them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.config.run import OptimConfig
from moe_train.distributed.collectives import world_group
from moe_train.model.build import build_model
from moe_train.model.parameters import optim_rules
from moe_train.ops.newton_schulz import orthogonalize
from moe_train.train.engine.optimizers.base import FlatPart
from moe_train.train.engine.optimizers.muon import MUON, Muon, MuonConfig, _buckets, _owners
from tests.model.small import VOCAB, small_config
from tests.ranks import RankPool

OPTIM = OptimConfig(name="muon", learning_rate=0.1)
RATE, DECAY, STEPS = 0.05, 0.2, 3
SHAPES = [((6, 10), 1), ((8, 5), 2), ((3, 4, 10), 2), ((3, 5, 4), 1)]  # shape, maps side by side
NUMEL = sum(math.prod(shape) for shape, _ in SHAPES)


def matrices_of(x: Tensor, beside: int) -> list[Tensor]:
    """Views of a parameter's matrices, one by one."""
    entries = [x] if x.dim() == 2 else list(x)
    return [part for entry in entries for part in entry.chunk(beside, dim=0 if x.dim() == 2 else 1)]


def gradients(step: int) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(step)
    found = [torch.randn(shape, generator=drawn) for shape, _ in SHAPES]
    if step == 1:  # an expert without tokens
        found[2][1].zero_()
        found[3][1].zero_()
    return found


def slow_training() -> Tensor:
    """The weights after some steps, by loops in fp64."""
    drawn = torch.Generator().manual_seed(100)
    weights = [torch.randn(shape, generator=drawn).double() for shape, _ in SHAPES]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step in range(STEPS):
        for (_, beside), weight, momentum, gradient in zip(SHAPES, weights, momenta, gradients(step), strict=True):
            momentum.mul_(0.95).add_(gradient.double())
            wanted = gradient.double() + 0.95 * momentum
            for w, n, g in zip(*(matrices_of(x, beside) for x in (weight, wanted, gradient)), strict=True):
                if not g.any():
                    continue
                update = orthogonalize(n[None], 1e-7, torch.float64)[0]
                w.sub_(RATE * (0.2 * math.sqrt(max(w.shape)) * update + DECAY * w))
    return torch.cat([weight.flatten() for weight in weights]).float()


def parts(first: int, last: int) -> list[FlatPart]:
    """Where the parameters lie in the partition of a rank that has the elements first .. last - 1 of all."""
    found, begin = [], 0
    for shape, beside in SHAPES:
        end = begin + math.prod(shape)
        low, high = max(first, begin), min(last, end)
        stacked = shape[0] if len(shape) == 3 else 1
        start, offset = (low - begin, low - first) if low < high else (0, 0)
        found.append(FlatPart(shape, stacked, beside, start, offset, max(0, high - low)))
        begin = end
    return found


def trained(first: int, last: int, group: Any) -> Tensor:
    """A rank's partition after the same steps."""
    drawn = torch.Generator().manual_seed(100)
    whole = torch.cat([torch.randn(shape, generator=drawn).flatten() for shape, _ in SHAPES])
    flat = torch.nn.Parameter(whole[first:last].clone())
    settings = {"params": [flat], "is_matrix": True, "lr": RATE, "weight_decay": DECAY}
    muon = Muon([settings], OPTIM, MuonConfig())
    muon.bind(flat, parts(first, last), group)
    for step in range(STEPS):
        flat.grad = torch.cat([gradient.flatten() for gradient in gradients(step)])[first:last].clone()
        muon.step()
    assert list(muon.state[flat]) == ["exp_avg", "step"]  # one moment
    return flat.detach()


def test_one_rank_is_a_loop_over_matrices() -> None:
    torch.testing.assert_close(trained(0, NUMEL, None), slow_training(), rtol=1e-4, atol=1e-4)


def _trained_on(rank: int, world_size: int, cut: int) -> float:
    first, last = (0, cut) if rank == 0 else (cut, NUMEL)
    return float((trained(first, last, world_group()) - trained(0, NUMEL, None)[first:last]).abs().max())


@pytest.mark.parametrize("cut", [30, 60, 101, 215, NUMEL - 1])
def test_ranges_of_two_ranks_are_those_of_one(pool2: RankPool, cut: int) -> None:
    assert max(pool2.run(_trained_on, cut)) < 2e-6


def test_small_buckets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(0, NUMEL, None)
    monkeypatch.setattr("moe_train.train.engine.optimizers.muon._BUCKET_ELEMENTS", 70)
    assert len(list(_buckets(parts(0, NUMEL)))) == 4
    torch.testing.assert_close(trained(0, NUMEL, None), whole, rtol=1e-6, atol=1e-6)


def test_work_is_spread_evenly() -> None:
    part = FlatPart((16, 64, 128), 16, 2, 0, 0, 0)
    owners = [owner for found in _owners([part, part], 4) for owner in found]
    assert [owners.count(rank) for rank in range(4)] == [16, 16, 16, 16]


def test_what_is_no_matrix_follows_adamw() -> None:
    drawn = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(50, generator=drawn), torch.randn(50, generator=drawn)
    found = []
    for make in (
        lambda p: Muon([{"params": [p], "is_matrix": False, "lr": RATE, "weight_decay": DECAY}], OPTIM, MuonConfig()),
        lambda p: torch.optim.AdamW([p], lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, fused=True),
    ):
        parameter = torch.nn.Parameter(values.clone())
        optimizer = make(parameter)
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        found.append(parameter.detach())
    assert torch.equal(*found)


def test_which_parameters_are_matrices() -> None:
    config = small_config(moe={"num_experts": 4, "num_shared_experts": 1})
    rules = optim_rules(build_model(config, VOCAB))
    counts = {name.removeprefix("blocks.1."): rule.matrices for name, rule in rules.items() if "blocks.1." in name}
    assert {name: count for name, count in counts.items() if count} == {
        "mixer.query.weight": 1,
        "mixer.key.weight": 1,
        "mixer.value.weight": 1,
        "mixer.output.weight": 1,
        "feed_forward.experts.gate_up": 2,
        "feed_forward.experts.down": 1,
        "feed_forward.shared.gate_up.weight": 2,
        "feed_forward.shared.down.weight": 1,
    }
    assert not any(rules[name].matrices for name in ("embedding.weight", "head.weight"))
    assert MUON.moments_of(True) == ("exp_avg",) and MUON.moments_of(False) == ("exp_avg", "exp_avg_sq")
