"""Mixers on ranks that share rows: outputs and gradients of whole models are those of one rank, in fp64."""

from typing import Any

import pytest
import torch

from moe_train.config.run import RecomputedPart
from moe_train.distributed.collectives import all_reduce_sum
from moe_train.distributed.context import ContextRanks
from moe_train.distributed.mesh import create_mesh
from moe_train.train.batches import make_tokens
from tests.model.mixers.checks import make
from tests.model.small import random_ids

LENGTH, BATCH = 32, 2
MARK = 5  # token that ends a document
INFINI = {"mixer": "infini", "infini": {"segment_length": 4}, "moe_every": 2}
PATTERNS: dict[str, dict[str, Any]] = {
    "attention": {"num_kv_heads": 2, "kv_layers": 2},
    "windows by layer": {"num_kv_heads": 1, "window_pattern": [5, None]},
    "rwkv4": {"mixer": "rwkv4", "feed_forward": "rwkv_channel_mix", "moe_every": 2},
    "rwkv4 and attention": {"mixers": ["rwkv4", "attention"], "feed_forward": "rwkv7_channel_mix", "moe_every": 2},
    "infini": INFINI,
}


def scopes(changes: dict[str, Any]) -> dict[str, Any]:
    """The model with a balance of each sequence, which tokens of several ranks form together."""
    moe = {"num_experts": 4, "top_k": 2, "switch_aux_coef": 0.1, "switch_scope": "sequence"}
    return {**changes, "moe": moe}


def differences(
    rank: int, world_size: int, changes: dict[str, Any], has_documents: bool, exchange: Any, recompute: RecomputedPart
) -> tuple[float, float]:
    """Largest differences of this rank's logits and of the sum of all ranks' gradients from those of whole rows."""
    group = create_mesh(1, 60, context_size=world_size).context
    assert group is not None
    ids, sequences, mark = (
        random_ids(BATCH, LENGTH).numpy(),
        torch.arange(BATCH).numpy(),
        MARK if has_documents else None,
    )
    ranks, device = ContextRanks(group.group, rank, world_size, exchange), torch.device("cpu")
    upstream = torch.randn(BATCH, LENGTH, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for context in (None, ranks):
        model = make(scopes(changes), recompute).train()
        output = model(make_tokens(ids, sequences, 3, mark, device, context))
        columns = torch.arange(LENGTH) if context is None else torch.from_numpy(context.columns(LENGTH))
        # Every rank has the whole sum, and takes its share of it: the gradients of all ranks are added up.
        balance = output.sums.sequence_balance.sum() / (1 if context is None else world_size)
        ((output.logits_BSV * upstream[:, columns]).sum() + balance).backward()
        found.append((output.logits_BSV.detach(), columns, [p.grad for p in model.parameters()]))
    (whole, _, expected), (own, columns, partial) = found
    far = max(
        (all_reduce_sum(ours, group.group) - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
        for ours, theirs in zip(partial, expected, strict=True)
    )
    return (own - whole[:, columns]).abs().max().item(), far


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [2, 4])
def test_all_is_that_of_whole_rows(pattern, size, pool2, pool4):
    pool = {2: pool2, 4: pool4}[size]
    ways = [
        (False, "all_gather", "none"),
        (pattern != "infini", "ring", "block"),
        (False, "ring", "attention"),
    ]  # documents and infini: refused
    if "kv_layers" in PATTERNS[pattern]:
        ways += [(True, "gather_once", part) for part in ("none", "attention", "experts", "block")]
    for has_documents, exchange, recompute in ways:
        arguments = (PATTERNS[pattern], has_documents, exchange, recompute)
        for outputs, gradients in pool.run(differences, *arguments, timeout=120):
            # Four layers of sums in another order, of logits up to 30.
            assert outputs <= 1e-11 and gradients <= 1e-11, (arguments, outputs, gradients)
