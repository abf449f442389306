"""Decoding in the kv_cache benchmark: many models in turn, each with a cache that is filled up to a length.

Legend: B batch, S sequence, V vocabulary.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.kv_cache.rows import Decoded, Recomputed, Sharing
from benchmarks.runner.results import say
from benchmarks.runner.rounds import median_ratio, run_rounds
from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model
from moe_train.model.decode_state import Cache
from moe_train.model.mixers.key_value import KeyValue, kv_cache_bytes
from moe_train.model.parameters import materialize
from moe_train.model.transformer import Tokens, Transformer

STEPS = 4  # timed at once; the last of them reaches the length
VOCAB_SIZE = 4096
# The model of the training runs but for its widths: heads of a usual size, so that reading them is what decoding costs.
WIDTHS: dict[str, Any] = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 512}
EXPERT_WIDTH = 128
DTYPE = torch.float32
_PREFILL_CHUNK = 256
_MOST_RECOMPUTED_ROUNDS = 5  # each takes seconds, and the ratio is far from its bar


@dataclass(frozen=True)
class DecodePlan:
    """What is measured.

    Attributes:
        model: Section `model` of the configuration; widths and sharing come on top.
        batch_size: Number of sequences.
        lengths: Tokens at which decoding is timed, rising.
        rounds: Timings at every length.
        seed: Seed of weights, keys and values.
    """

    model: dict[str, Any]
    batch_size: int
    lengths: tuple[int, ...]
    rounds: int
    seed: int


class _Subject:
    """A model and its cache."""

    def __init__(self, sharing: Sharing, plan: DecodePlan) -> None:
        self.model, self.config = build(sharing, plan)
        self.cache = self.model.new_cache(plan.batch_size, plan.lengths[-1], DTYPE)
        self.mark = self.cache.snapshot()
        self.seconds: dict[int, list[float]] = {}  # of the rounds, by length

    def fill(self, start: int, stop: int, batch_size: int, generator: torch.Generator) -> None:
        """Append random keys and values for the places from start to stop to what was there at the mark."""
        self.cache.restore(self.mark)
        shape = (batch_size, self.config.attention_kv_heads, stop - start, self.config.attention_head_dim)
        positions_BC = torch.arange(start, stop).unsqueeze(0)
        for layer in self.cache.layers_with_state:
            k_BGCd, v_BGCd = (torch.randn(shape, generator=generator, dtype=DTYPE) for _ in range(2))
            state: Any = self.cache.layer(layer).mixer
            state.append(KeyValue(k_BGCd, v_BGCd, positions_BC, None), first_position=start)
        self.mark = self.cache.snapshot()


def build(sharing: Sharing, plan: DecodePlan) -> tuple[Transformer, ModelConfig]:
    """Build a model with its initial weights, for evaluation, and its configuration."""
    moe = {**plan.model.get("moe", {}), "intermediate_size": EXPERT_WIDTH}
    shared = {"kv_layers": sharing.kv_layers, "num_kv_heads": sharing.num_kv_heads}
    config = ModelConfig.model_validate({**plan.model, **WIDTHS, **shared, "moe": moe})
    model = build_model(config, VOCAB_SIZE, seed=plan.seed, measures=False)
    materialize(model, seed=plan.seed, dtype=DTYPE, device=torch.device("cpu"))
    return model.eval(), config


@torch.inference_mode()
def measure_decoding(sharings: Sequence[Sharing], plan: DecodePlan) -> dict[Sharing, Decoded]:
    """Time greedy decoding of every model at every length, the models in turn in every round."""
    subjects = {sharing: _Subject(sharing, plan) for sharing in sharings}
    generator = torch.Generator().manual_seed(plan.seed)
    # The cache is filled up to STEPS before a length, so that the last timed token is at that length.
    for start, length in pairwise((STEPS, *plan.lengths)):
        for subject in subjects.values():
            subject.fill(start - STEPS, length - STEPS, plan.batch_size, generator)

        def timed(sharing: Sharing, _: int, position: int = length - STEPS) -> float:
            return _timed_steps(subjects[sharing], position, plan)

        seconds = run_rounds(list(subjects), plan.rounds, timed, warm_ups=1, rotates=False)
        for sharing, subject in subjects.items():
            subject.seconds[length] = seconds[sharing]
        say(f"decoding at length {length:,}: {plan.rounds} rounds of {len(subjects)} models")
    return {sharing: _decoded(sharing, subject, plan) for sharing, subject in subjects.items()}


@torch.inference_mode()
def measure_recomputation(sharing: Sharing, plan: DecodePlan, length: int) -> Recomputed:
    """Time greedy decoding of one sequence up to a length, with the cache and by recomputing the prefix, in turn."""
    model, _ = build(sharing, plan)
    generator = torch.Generator().manual_seed(plan.seed)
    prompt_1S = torch.randint(0, VOCAB_SIZE, (1, length - STEPS + 1), generator=generator)
    cache = model.new_cache(1, length, DTYPE)
    held = length - STEPS  # the last token of the prompt is the first that is timed
    for start in range(0, held, _PREFILL_CHUNK):
        _next_logits(model, prompt_1S[:, start : min(start + _PREFILL_CHUNK, held)], start, cache)
    mark = cache.snapshot()
    cached, recomputed, is_same = [], [], True
    for number in range(-1, min(plan.rounds, _MOST_RECOMPUTED_ROUNDS)):
        began = time.perf_counter()
        ours = greedy(model, prompt_1S[:, -1:], held, cache)
        between = time.perf_counter()
        theirs = greedy_without_cache(model, prompt_1S)
        ended = time.perf_counter()
        cache.restore(mark)
        is_same = is_same and torch.equal(ours, theirs)
        if number >= 0:
            cached.append(between - began)
            recomputed.append(ended - between)
    return Recomputed(
        length=length,
        cached_tokens_per_second=STEPS / statistics.median(cached),
        recomputed_tokens_per_second=STEPS / statistics.median(recomputed),
        ratio=median_ratio(recomputed, cached),
        same_tokens=is_same,
    )


def greedy(model: Transformer, ids_B1: Tensor, position: int, cache: Cache) -> Tensor:
    """Choose STEPS tokens after the one at a position; the cache has everything before it. int64 [B, STEPS]."""
    chosen = []
    for step in range(STEPS):
        ids_B1 = _next_logits(model, ids_B1, position + step, cache).argmax(-1, keepdim=True)
        chosen.append(ids_B1)
    return torch.cat(chosen, dim=1)


def greedy_without_cache(model: Transformer, ids_BS: Tensor) -> Tensor:
    """Choose STEPS tokens after the given ones. int64 [B, STEPS]."""
    text_BS = ids_BS
    for _ in range(STEPS):
        text_BS = torch.cat((text_BS, _next_logits(model, text_BS, 0, None).argmax(-1, keepdim=True)), dim=1)
    return text_BS[:, -STEPS:]


def _next_logits(model: Transformer, ids_BS: Tensor, position: int, cache: Cache | None) -> Tensor:
    """Logits of the token after the given ones, the first of which is at a position. [B, V]."""
    tokens = Tokens(ids_BS, torch.arange(len(ids_BS)), first_position=position)
    return model(tokens, cache, num_logits=1).logits_BSV[:, -1]


def _timed_steps(subject: _Subject, position: int, plan: DecodePlan) -> float:
    ids_B1 = torch.arange(plan.batch_size).unsqueeze(1) % VOCAB_SIZE
    began = time.perf_counter()
    greedy(subject.model, ids_B1, position, subject.cache)
    seconds = time.perf_counter() - began
    subject.cache.restore(subject.mark)
    return seconds


def _decoded(sharing: Sharing, subject: _Subject, plan: DecodePlan) -> Decoded:
    parameters = list(subject.model.parameters())
    return Decoded(
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        cache_bytes=subject.cache.nbytes,
        formula_bytes=kv_cache_bytes(
            batch_size=plan.batch_size,
            length=plan.lengths[-1],
            num_owner_layers=sharing.kv_layers,
            num_kv_heads=sharing.num_kv_heads,
            head_dim=subject.config.attention_head_dim,
            bytes_per_element=DTYPE.itemsize,
        ),
        seconds=subject.seconds,
        tokens=plan.batch_size * STEPS,
        batch_size=plan.batch_size,
    )
