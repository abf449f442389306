"""Associative recall in the mixers benchmark: can a mixer tell a value from its key, several segments later?

A sequence begins with pairs of a key and its value, which fill the first segment. Noise follows. In the last segment
each key comes again, in another order, before its value; what is predicted there counts.

Legend: B batch, S sequence, V vocabulary, P pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_train
from benchmarks.mixers.rows import Variant
from benchmarks.runner.results import say
from moe_train.model.transformer import Tokens, Transformer

SEGMENT = 16  # tokens of a mini-batch of TTT and of a segment of Infini-attention
SEGMENTS = 4
LENGTH = SEGMENTS * SEGMENT
PAIRS = SEGMENT // 2
KINDS = 16  # keys, values and noise tokens to choose from
_VOCAB_SIZE = 3 * KINDS
_BATCH_SIZE = 32
_TEST_SEQUENCES = 512
_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 50


@dataclass(frozen=True)
class Recall:
    """What one variant recalls.

    Attributes:
        variant: Name of the variant.
        accuracy: Share of the values that are predicted rightly, on sequences that training has not seen.
        steps: Steps of training.
    """

    variant: str
    accuracy: float
    steps: int


def draw_sequences(batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences: tokens [B, LENGTH], and the places [B, PAIRS] of the keys in the last segment."""

    def choose(number: int) -> Tensor:
        return torch.rand(batch_size, KINDS, generator=generator).argsort(1)[:, :number]

    keys_BP, order_BP = choose(PAIRS), torch.rand(batch_size, PAIRS, generator=generator).argsort(1)
    values_BP = KINDS + torch.randint(KINDS, (batch_size, PAIRS), generator=generator)
    noise_BS = 2 * KINDS + torch.randint(KINDS, (batch_size, LENGTH - 2 * SEGMENT), generator=generator)
    first_BS = torch.stack((keys_BP, values_BP), dim=2).flatten(1)
    last_BS = torch.stack((keys_BP.gather(1, order_BP), values_BP.gather(1, order_BP)), dim=2).flatten(1)
    places_P = LENGTH - SEGMENT + 2 * torch.arange(PAIRS)
    return torch.cat((first_BS, noise_BS, last_BS), dim=1), places_P.expand(batch_size, -1)


def build(variant: Variant, seed: int) -> Transformer:
    """Build a small dense model of two layers."""
    segment = {"infini": {"segment_length": SEGMENT}} if "infini" in variant.mixers else {}
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128, "moe_layers": []}
    config = moe_train.load_config(
        None, model={**shape, "mixers": list(variant.mixers), **segment}, train={"seed": seed}
    )
    return moe_train.build_model(config, _VOCAB_SIZE)


def measure_recall(variant: Variant, steps: int, seed: int) -> Recall:
    """Train a small model of the variant on recall, and test it.

    Args:
        variant: Mixers of the model.
        steps: Steps of training.
        seed: Seed of weights and training sequences.
    """
    torch.set_num_threads(1)
    model = build(variant, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        warm = min(1.0, (step + 1) / _WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * warm * min(1.0, 5 * (steps - step) / steps)
        model.warm_up(warm)
        logits_BPV, values_BP = _answers(model, *draw_sequences(_BATCH_SIZE, generator))
        F.cross_entropy(logits_BPV.flatten(0, 1), values_BP.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tests = draw_sequences(_TEST_SEQUENCES, torch.Generator().manual_seed(seed + 1_000_003))
        logits_BPV, values_BP = _answers(model.eval(), *tests)
    accuracy = float((logits_BPV.argmax(-1) == values_BP).double().mean())
    say(f"recall, {variant.name}: {accuracy:.1%} after {steps} steps")
    return Recall(variant.name, accuracy, steps)


def _answers(model: Transformer, ids_BS: Tensor, places_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the keys of the last segment [B, P, V], and the values that are right there [B, P]."""
    logits_BSV = model(Tokens(ids_BS, torch.arange(len(ids_BS)))).logits_BSV
    logits_BPV = logits_BSV.gather(1, places_BP.unsqueeze(2).expand(-1, -1, logits_BSV.shape[2]))
    return logits_BPV, ids_BS.gather(1, places_BP + 1)
