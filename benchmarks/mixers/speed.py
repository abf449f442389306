"""Speed and state in the mixers benchmark: training and decoding at growing contexts, the variants in turn.

Times are CPU time of one thread, so that other work on the machine counts little.

Legend: B batch, S sequence, V vocabulary.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moe_train
from benchmarks.mixers.rows import CONFIG, MIXERS, Variant, unread_fields
from benchmarks.runner.results import say
from benchmarks.runner.rounds import median_ratio, run_rounds
from moe_train.model.decode_state import Cache
from moe_train.model.transformer import Tokens, Transformer
from moe_train.ops.cross_entropy import token_cross_entropy

DECODED = 32  # tokens timed at once, and so every offset in a mini-batch of 16
SHORT, LONG = 1024, 16384  # contexts between which a state of fixed size must keep its time and bytes
TOLERANCE = 0.1
_VOCAB_SIZE = 4096
_TRAINED_TOKENS = 2048  # of a training step, or one sequence
_PREFILL_CHUNK = 1024


@dataclass(frozen=True)
class Speed:
    """Speed and state of one variant at one context.

    Attributes:
        variant: Name of the variant.
        context: Tokens of a sequence.
        train_seconds: CPU seconds per token of a forward and backward pass, by round.
        decode_seconds: CPU seconds per token of greedy decoding of one sequence, by round.
        state_bytes: Bytes of the decode state of one sequence, as the cache reports them.
    """

    variant: str
    context: int
    train_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    state_bytes: int

    @property
    def train_tokens_per_second(self) -> float:
        """Median over the rounds."""
        return 1 / statistics.median(self.train_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Median over the rounds."""
        return 1 / statistics.median(self.decode_seconds)


@dataclass(frozen=True)
class _Point:
    """A variant at a context."""

    variant: Variant
    context: int


def build(variant: Variant, seed: int) -> Transformer:
    """Build the quickstart's model with the variant's mixers, which have their usual settings."""
    train = {"seed": seed, "sequence_length": LONG}
    config = moe_train.load_config(
        CONFIG, model={"mixers": list(variant.mixers), **unread_fields(variant)}, train=train
    )
    return moe_train.build_model(config, _VOCAB_SIZE)


def measure_speed(variants: Sequence[Variant], contexts: Sequence[int], rounds: int, seed: int) -> list[Speed]:
    """Time training and decoding of every variant at every context; each round has all of them.

    Args:
        variants: Mixers of the models.
        contexts: Tokens of a sequence.
        rounds: Timings of decoding; training has at most three.
        seed: Seed of weights and tokens.
    """
    torch.set_num_threads(1)
    models = {variant: build(variant, seed) for variant in variants}
    points = [_Point(variant, context) for variant in variants for context in contexts]
    trained = run_rounds(points, min(rounds, 3), lambda p, _: _train_seconds(models[p.variant].train(), p.context))
    say(f"training: {len(points)} points")
    caches = {}
    for model in models.values():
        model.eval()
    for point in points:
        caches[point] = filled_cache(models[point.variant], point.context, seed)
    say(f"decode states: {len(points)} points")
    decoded = run_rounds(
        points, rounds, lambda p, _: _decode_seconds(models[p.variant], caches[p], p.context), warm_ups=1
    )
    say(f"decoding: {rounds} rounds of {len(points)} points")
    return [Speed(p.variant.name, p.context, tuple(trained[p]), tuple(decoded[p]), caches[p].nbytes) for p in points]


def _train_seconds(model: Transformer, context: int) -> float:
    batch_size = max(1, _TRAINED_TOKENS // context)
    generator = torch.Generator().manual_seed(context)
    ids_BS = torch.randint(_VOCAB_SIZE, (batch_size, context), generator=generator)
    began = time.process_time()
    logits_BSV = model(Tokens(ids_BS, torch.arange(batch_size))).logits_BSV
    token_cross_entropy(logits_BSV.flatten(0, 1), ids_BS.roll(-1, 1).flatten()).mean().backward()
    seconds = time.process_time() - began
    model.zero_grad()
    return seconds / ids_BS.numel()


@torch.inference_mode()
def filled_cache(model: Transformer, context: int, seed: int) -> Cache:
    """Make the decode state of one sequence that is DECODED tokens shorter than a context."""
    generator = torch.Generator().manual_seed(seed)
    ids_1S = torch.randint(_VOCAB_SIZE, (1, context - DECODED), generator=generator)
    cache = model.new_cache(1, context)
    for start in range(0, ids_1S.shape[1], _PREFILL_CHUNK):
        part_1S = ids_1S[:, start : start + _PREFILL_CHUNK]
        model(Tokens(part_1S, torch.zeros(1, dtype=torch.int64), first_position=start), cache, num_logits=1)
    return cache


@torch.inference_mode()
def _decode_seconds(model: Transformer, cache: Cache, context: int) -> float:
    mark = cache.snapshot()
    ids_11, sequences_1 = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    began = time.process_time()
    for position in range(context - DECODED, context):
        ids_11 = _next(model, Tokens(ids_11, sequences_1, first_position=position), cache)
    seconds = time.process_time() - began
    cache.restore(mark)
    return seconds / DECODED


def _next(model: Transformer, tokens: Tokens, cache: Cache) -> Tensor:
    return model(tokens, cache, num_logits=1).logits_BSV[:, -1].argmax(-1, keepdim=True)


def speed_claims(speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    """What the mixers with a state of fixed size are to show: the same time and bytes at a long context.

    Returns:
        For each of them that was measured at both contexts: claim, in words with its figures; holds.
    """
    of = {(speed.variant, speed.context): speed for speed in speeds}
    claims = []
    for name in MIXERS:
        short, long = of.get((name, SHORT)), of.get((name, LONG))
        if short is None or long is None:
            continue
        time_ratio = median_ratio(long.decode_seconds, short.decode_seconds)
        bytes_ratio = long.state_bytes / short.state_bytes
        claims.append(
            {
                "claim": f"{name} decodes at {LONG:,} as at {SHORT:,} within {TOLERANCE:.0%}: "
                f"{time_ratio:.2f} times the time of a token, {bytes_ratio:.2f} times the bytes.",
                "holds": all(abs(ratio - 1) <= TOLERANCE for ratio in (time_ratio, bytes_ratio)),
            }
        )
    return claims
