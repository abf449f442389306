"""Times and bytes of hidden copies: attention in training, decoding, prefill, and the cache.

Legend: B batch, H query heads, S sequence, d head size.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hidden_decoding.rows import Copies, Timing
from benchmarks.runner.results import say
from benchmarks.runner.rounds import median_ratio, run_rounds
from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model
from moe_train.model.decode_state import Cache
from moe_train.model.parameters import materialize
from moe_train.model.transformer import Tokens, Transformer
from moe_train.ops.hidden_attention import hidden_attention, hidden_blocks

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64  # of the attention that is timed
VOCAB_SIZE = 4096
DTYPE = torch.float32


@dataclass(frozen=True)
class DecodePlan:
    """Settings of decoding.

    Attributes:
        hidden_size: Width of the model; one sequence is decoded, so its weights are what decoding reads.
        num_layers: Blocks of the model.
        length: Tokens of the prompt.
        steps: Tokens that are decoded in one timing.
        rounds: Number of timings.
    """

    hidden_size: int
    num_layers: int
    length: int
    steps: int
    rounds: int


def measure_attention(rows: Sequence[Copies], length: int, rounds: int) -> dict[Copies, Timing]:
    """Time attention forward and backward, all rows in turn, over plain attention without a mask.

    Args:
        rows: What is timed; the first has no hidden copies.
        length: S, tokens of the sequence.
        rounds: Number of timings.
    """
    runs = {row: _attention(row, length) for row in rows}
    seconds = run_rounds(list(rows), rounds, lambda row, _: _seconds(runs[row]), warm_ups=1)
    say(f"attention over {length:,} tokens: {rounds} rounds")
    return _timings(rows, seconds)


def _attention(row: Copies, length: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, row.copies * length, HEAD_DIM, generator=generator, requires_grad=True)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    blocks = hidden_blocks(torch.arange(length)[None], row.copies, row.window, row.chunk) if row.copies > 1 else None

    def run() -> None:
        if blocks is None:
            y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = hidden_attention(q, k, v, blocks, None)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    return run


class _Subject:
    """A model that has read a prompt."""

    def __init__(self, row: Copies, plan: DecodePlan) -> None:
        self.row, self.plan = row, plan
        config = ModelConfig.model_validate(
            {
                "hidden_size": plan.hidden_size,
                "num_layers": plan.num_layers,
                "num_heads": plan.hidden_size // HEAD_DIM,
                "num_kv_heads": max(1, plan.hidden_size // HEAD_DIM // 4),
                "intermediate_size": 3 * plan.hidden_size,
                "moe_every": 0,
                "hidden_copies": row.settings,
            }
        )
        self.model: Transformer = build_model(config, VOCAB_SIZE, measures=False)
        materialize(self.model, seed=0, dtype=DTYPE, device=torch.device("cpu"))
        self.model.eval()
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(0, VOCAB_SIZE, (1, plan.length), generator=generator)
        self.cache: Cache = self.model.new_cache(1, plan.length + plan.steps, DTYPE)
        self.empty = self.cache.snapshot()
        self.prefill()
        self.read = self.cache.snapshot()

    def prefill(self) -> None:
        """Read the prompt into an empty cache."""
        self.cache.restore(self.empty)
        tokens = self.model.for_prefill(Tokens(self.prompt, torch.zeros(1, dtype=torch.int64)))
        self.model(tokens, self.cache, num_logits=1)

    def decode(self) -> None:
        """Decode greedily from the end of the prompt."""
        self.cache.restore(self.read)
        ids = self.prompt[:, -1:]
        for step in range(self.plan.steps):
            tokens = Tokens(ids, torch.zeros(1, dtype=torch.int64), first_position=self.plan.length + step)
            ids = self.model(tokens, self.cache, num_logits=1).logits_BSV[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()
def measure_decoding(
    rows: Sequence[Copies], plan: DecodePlan
) -> tuple[dict[Copies, Timing], dict[Copies, Timing], dict[Copies, int]]:
    """Time prefill and decoding of one sequence, all rows in turn.

    Args:
        rows: What is timed; the first has no hidden copies.
        plan: Settings of decoding.

    Returns:
        Prefill and decoding of each row, the latter per token, and the bytes of its cache.
    """
    subjects = {row: _Subject(row, plan) for row in rows}
    prefill = run_rounds(list(rows), plan.rounds, lambda row, _: _seconds(subjects[row].prefill), warm_ups=1)
    say(f"prefill of {plan.length:,} tokens: {plan.rounds} rounds of {len(rows)} models")
    for subject in subjects.values():
        subject.prefill()
        subject.read = subject.cache.snapshot()
    decode = run_rounds(list(rows), plan.rounds, lambda row, _: _seconds(subjects[row].decode) / plan.steps, warm_ups=1)
    say(f"decoding at {plan.length:,} tokens: {plan.rounds} rounds of {len(rows)} models")
    nbytes = {row: subject.cache.nbytes for row, subject in subjects.items()}
    return _timings(rows, prefill), _timings(rows, decode), nbytes


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _timings(rows: Sequence[Copies], seconds: dict[Copies, list[float]]) -> dict[Copies, Timing]:
    plain = seconds[rows[0]]
    return {row: Timing(min(seconds[row]), median_ratio(seconds[row], plain)) for row in rows}
