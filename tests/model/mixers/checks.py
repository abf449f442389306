"""Checks that every mixer passes, alone and in a pattern with others, in whole models with MoE layers, fp64.

Each takes the changes of `small_config` that choose the mixers. `length` is long enough for more than one period of
whatever the mixer counts by.
"""

from collections.abc import Callable, Sequence
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor

from moe_train.config.run import RecomputedPart
from moe_train.model.decode_state import Cache
from moe_train.model.mixers.base import MixerContext
from moe_train.model.token_index import document_offsets
from moe_train.model.transformer import Tokens, Transformer
from tests.model.small import VOCAB, random_ids, small_config, small_model

BATCH = 2
CLOSE = {"rtol": 0, "atol": 1e-10}  # fp64; another split changes the order of sums
KEPT = {"rtol": 0, "atol": 1e-12}  # of the first tokens of some that came together: nearly the same operations


def make(changes: dict[str, Any], recompute: RecomputedPart = "none") -> Transformer:
    """A model whose parameters all matter: those that begin at zero get values too."""
    model = small_model(small_config(**changes), recompute=recompute)
    generator = torch.Generator().manual_seed(17)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return model


def packed_documents(length: int, batch: int = BATCH) -> Tensor:
    """Documents of other lengths in every row."""
    rows = [torch.arange(length) * (2 + row) // (length + row) + 3 * row for row in range(batch)]
    return torch.stack(rows)


def padded_documents(length: int, batch: int = BATCH) -> Tensor:
    """One document a row behind padding (document -1) of other lengths in every row."""
    return torch.stack([torch.where(torch.arange(length) < 2 * row + 1, -1, 0) for row in range(batch)])


def index_of(ids: Tensor, documents: Tensor | None) -> Tokens:
    """The whole sequence as a model's input, positions and offsets given where there are documents."""
    sequences = torch.arange(len(ids))
    if documents is None:
        return Tokens(ids, sequences, step=3)
    offsets = document_offsets(documents)
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    positions = torch.where(documents < 0, 0, columns - (documents < 0).sum(1, keepdim=True))
    return Tokens(ids, sequences, 3, positions, documents, offsets)


def part_of(tokens: Tokens, start: int, end: int) -> Tokens:
    """Some columns of a sequence."""
    span = slice(start, end)
    if tokens.documents_BS is None or tokens.positions_BS is None or tokens.offsets_BS is None:
        return Tokens(tokens.ids_BS[:, span], tokens.sequences_B, tokens.step, first_position=start)
    parts = (each[:, span] for each in (tokens.positions_BS, tokens.documents_BS, tokens.offsets_BS))
    return Tokens(tokens.ids_BS[:, span], tokens.sequences_B, tokens.step, *parts)


@torch.no_grad()
def stream(model: Transformer, tokens: Tokens, sizes: Sequence[int], cache: Cache, start: int = 0) -> Tensor:
    """Logits of a sequence that comes in parts."""
    logits = []
    for size in sizes:
        logits.append(model(part_of(tokens, start, start + size), cache).logits_BSV)
        start += size
    return torch.cat(logits, dim=1)


def splits(length: int, count: int = 4) -> list[list[int]]:
    """The whole, one by one, and random splits."""
    generator = torch.Generator().manual_seed(length)
    found = [[length], [1] * length]
    for _ in range(count):
        ends = torch.randperm(length - 1, generator=generator)[: length // 3].add(1).sort().values.tolist()
        found.append([end - begin for begin, end in zip([0, *ends], [*ends, length], strict=True)])
    return found


def check_causality(changes: dict[str, Any], length: int) -> None:
    """A changed token changes no output before it, and none of another document: exactly."""
    model, ids = make(changes).eval(), random_ids(BATCH, length)
    for documents in (None, packed_documents(length)):
        for place in (0, length // 2, length - 1):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % VOCAB
            with torch.no_grad():
                before, after = (model(index_of(each, documents)).logits_BSV for each in (ids, changed))
            assert torch.equal(after[:, :place], before[:, :place])
            assert (after[:, place] - before[:, place]).abs().max() > 1e-6
            if documents is not None:
                others = documents != documents[:, place : place + 1]
                assert torch.equal(after[others], before[others])


def check_streaming(changes: dict[str, Any], length: int) -> None:
    """Any split of the sequence gives the same outputs; so do packed rows, and rows with unequal padding."""
    model, ids = make(changes).eval(), random_ids(BATCH, length)
    for documents in (None, packed_documents(length), padded_documents(length)):
        tokens = index_of(ids, documents)
        with torch.no_grad():
            full = model(tokens).logits_BSV
        shown = torch.ones_like(ids, dtype=torch.bool) if documents is None else documents >= 0
        for sizes in splits(length):
            found = stream(model, tokens, sizes, model.new_cache(BATCH, length))
            torch.testing.assert_close(found[shown], full[shown], **CLOSE)
    for row in range(BATCH):  # padding changes nothing
        padding = 2 * row + 1
        with torch.no_grad():
            alone = model(Tokens(ids[row : row + 1, padding:], torch.tensor([row]), 3)).logits_BSV
        torch.testing.assert_close(full[row : row + 1, padding:], alone, **CLOSE)


def check_going_back(changes: dict[str, Any], length: int) -> None:
    """After restore, twice from one mark, and after keep with other counts in each row, nothing is left of the rest.

    Memory that nobody has written is not a number here: what reads it is found.
    """
    with mock.patch.object(torch, "empty", _empty_of_nan):
        _go_back(changes, length)


def _empty_of_nan(*args: Any, **kwargs: Any) -> Tensor:
    made = _empty(*args, **kwargs)
    return made.fill_(float("nan")) if made.is_floating_point() and not made.is_meta else made


_empty = torch.empty


def _go_back(changes: dict[str, Any], length: int) -> None:
    model, ids, other = make(changes).eval(), random_ids(BATCH, length), random_ids(BATCH, length, seed=1)
    tokens, start = index_of(ids, None), length // 3
    with torch.no_grad():
        full = model(tokens).logits_BSV
    cache = model.new_cache(BATCH, length + 6)
    stream(model, tokens, [start], cache)
    marks = cache.snapshot()
    for sizes in ([1, 3], [2, 2]):
        wrong = stream(model, index_of(other, None), sizes, cache, start)
        assert not torch.allclose(wrong, full[:, start : start + 4])
        cache.restore(marks)
    found = stream(model, tokens, [2, length - start - 2], cache, start)
    torch.testing.assert_close(found, full[:, start:], **CLOSE)

    for counts in ([0, 3], [4, 1], [2, 2]):
        cache = model.new_cache(BATCH, length + 6)
        stream(model, tokens, [start], cache)
        marks = cache.snapshot()
        stream(model, tokens, [1, 3], cache, start)
        cache.keep(marks, torch.tensor(counts))
        # Each row goes on at a place of its own, with tokens of its own.
        rest = torch.stack([other[row, : length - start - 4] for row in range(BATCH)])
        first = start + torch.tensor(counts)
        positions = first[:, None] + torch.arange(rest.shape[1])
        with torch.no_grad():
            after = Tokens(rest, tokens.sequences_B, 3, positions)
            found = model(after, cache).logits_BSV
            for row, count in enumerate(counts):
                joined = torch.cat((ids[row, : start + count], rest[row]))[None]
                expected = model(Tokens(joined, torch.tensor([row]), 3)).logits_BSV[:, start + count :]
                torch.testing.assert_close(found[row : row + 1], expected, **KEPT)


def gradients(model: Transformer, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of all parameters of a scalar."""
    model.zero_grad()
    run().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_recomputation(changes: dict[str, Any], length: int) -> None:
    """Outputs and gradients are the same to the last bit, whichever part is computed again."""
    ids = random_ids(BATCH, length)
    upstream = torch.randn(BATCH, length, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in get_args(RecomputedPart):
        model = make(changes, recompute)
        tokens = index_of(ids, packed_documents(length))
        logits = model(tokens).logits_BSV
        grads = gradients(model, lambda model=model, tokens=tokens: (model(tokens).logits_BSV * upstream).sum())
        results.append((logits.detach(), grads))
    (plain, grads), *others = results
    assert len(others) == 3
    for recomputed, recomputed_grads in others:
        assert torch.equal(recomputed, plain) and grads.keys() == recomputed_grads.keys()
        for name, grad in grads.items():
            assert torch.equal(recomputed_grads[name], grad), name
            assert grad.abs().max() > 1e-8, name


def check_packing(changes: dict[str, Any], length: int) -> None:
    """Documents in one row give the outputs and the gradients, added up, of each alone."""
    model, end = make(changes).eval(), length // 2
    ids = random_ids(1, length)
    documents = torch.where(torch.arange(length) < end, 4, 9)[None]
    upstream = torch.randn(1, length, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spans = (slice(0, end), slice(end, length))

    def alone(span: slice) -> Tensor:
        return model(Tokens(ids[:, span], torch.tensor([0]), 3)).logits_BSV

    packed = model(index_of(ids, documents)).logits_BSV
    torch.testing.assert_close(packed, torch.cat([alone(span) for span in spans], 1), **CLOSE)
    together = gradients(model, lambda: (model(index_of(ids, documents)).logits_BSV * upstream).sum())
    apart = gradients(model, lambda: sum((alone(span) * upstream[:, span]).sum() for span in spans))
    for name, grad in apart.items():
        torch.testing.assert_close(together[name], grad, **CLOSE, msg=name)


def check_gradients(changes: dict[str, Any], length: int) -> None:
    """Finite differences of the first layer's mixer, its input and all its parameters, with two documents."""
    model = make(changes)
    mixer = model.blocks[0].mixer
    tokens = index_of(random_ids(1, length), packed_documents(length, 1))
    context = MixerContext(0, model._token_index(tokens))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, length, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    names = [name for name, _ in mixer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x, context))[0]

    inputs = (x, *(parameter.detach().clone().requires_grad_() for parameter in mixer.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
