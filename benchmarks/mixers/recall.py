"""Associative recall in the mixers benchmark: can a mixer tell a value from its key, several segments later?

A sequence begins with pairs of a key and its value, which fill the first segment. Noise follows. In the last segment
each key comes again, in another order, and its value is to be predicted; noise stands in its place, so that no answer
can be told from the others.

To bind a value to its key a layer must look one token back. Attention can, RWKV does by its token shift, and TTT only
with its short convolutions, which are on here: without them it recalls nothing after 600 steps.

Legend: B batch, S sequence, V vocabulary, P pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_train
from benchmarks.mixers.rows import Variant, unread_fields
from benchmarks.runner.results import say
from moe_train.model.parameters import optim_rules
from moe_train.model.transformer import Tokens, Transformer

SEGMENT = 16  # tokens of a mini-batch of TTT and of a segment of Infini-attention
SEGMENTS = 4
LENGTH = SEGMENTS * SEGMENT
PAIRS = SEGMENT // 2
KINDS = 16  # keys, values and noise tokens to choose from
_TTT: dict[str, Any] = {"mini_batch": SEGMENT, "short_conv": True}
_VOCAB_SIZE = 3 * KINDS
_BATCH_SIZE = 32
_TEST_SEQUENCES = 512
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.01
_WARMUP_STEPS = 50
_INIT_STD = 0.1  # near 1 / sqrt(hidden_size): with the usual 0.02 attention has not begun to recall after 1,500 steps


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


@dataclass(frozen=True)
class Sequences:
    """Sequences of recall.

    Attributes:
        ids_BS: int64 tokens [B, LENGTH].
        places_BP: int64 places of the keys in the last segment.
        values_BP: int64 values that are right there.
    """

    ids_BS: Tensor
    places_BP: Tensor
    values_BP: Tensor


def draw_sequences(batch_size: int, generator: torch.Generator) -> Sequences:
    """Draw sequences; the keys of one differ, and so do its values."""

    def choose(number: int, kinds: int = KINDS) -> Tensor:
        return torch.rand(batch_size, kinds, generator=generator).argsort(1)[:, :number]

    keys_BP, values_BP, order_BP = choose(PAIRS), KINDS + choose(PAIRS), choose(PAIRS, PAIRS)
    noise_BS = 2 * KINDS + torch.randint(KINDS, (batch_size, LENGTH), generator=generator)
    places_BP = (LENGTH - SEGMENT + 2 * torch.arange(PAIRS)).expand(batch_size, -1)
    ids_BS = noise_BS.scatter(1, places_BP, keys_BP.gather(1, order_BP))
    ids_BS[:, :SEGMENT] = torch.stack((keys_BP, values_BP), dim=2).flatten(1)
    return Sequences(ids_BS, places_BP, values_BP.gather(1, order_BP))


def build(variant: Variant, seed: int) -> Transformer:
    """Build a small dense model of two layers."""
    settings = {"infini": {"segment_length": SEGMENT}} | dict.fromkeys(("ttt_linear", "ttt_mlp"), _TTT)
    own = {name: settings[name] for name in set(variant.mixers) & set(settings)}
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128, "init_std": _INIT_STD}
    dense: dict[str, Any] = {"moe_layers": [], "mixers": list(variant.mixers), **unread_fields(variant)}
    config = moe_train.load_config(None, model={**shape, **dense, **own}, train={"seed": seed})
    return moe_train.build_model(config, _VOCAB_SIZE)


def parameter_groups(model: Transformer) -> list[dict[str, Any]]:
    """Group the parameters by the rules of their mixers: factor of the learning rate, and whether they decay.

    The trainer's own groups are DeepSpeed's, which nothing here needs.
    """
    rules = optim_rules(model)
    named = dict(model.named_parameters())
    return [
        {
            "params": [named[name] for name in named if rules[name] == rule],
            "lr": _LEARNING_RATE * rule.lr_factor,
            "lr_factor": rule.lr_factor,
            "weight_decay": _WEIGHT_DECAY if rule.weight_decay else 0.0,
        }
        for rule in dict.fromkeys(rules.values())
    ]


def measure_recall(variant: Variant, steps: int, seed: int) -> Recall:
    """Train a small model of the variant on recall, and test it.

    Args:
        variant: Mixers of the model.
        steps: Steps of training.
        seed: Seed of weights and training sequences.
    """
    torch.set_num_threads(1)
    model = build(variant, seed)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        warm = min(1.0, (step + 1) / _WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * group["lr_factor"] * warm * min(1.0, 5 * (steps - step) / steps)
        model.warm_up(warm)
        drawn = draw_sequences(_BATCH_SIZE, generator)
        F.cross_entropy(_logits_BPV(model, drawn).flatten(0, 1), drawn.values_BP.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tests = draw_sequences(_TEST_SEQUENCES, torch.Generator().manual_seed(seed + 1_000_003))
        is_right_BP = _logits_BPV(model.eval(), tests).argmax(-1) == tests.values_BP
    accuracy = float(is_right_BP.double().mean())
    say(f"recall, {variant.name}: {accuracy:.1%} after {steps} steps")
    return Recall(variant.name, accuracy, steps)


def _logits_BPV(model: Transformer, drawn: Sequences) -> Tensor:
    """Logits at the keys of the last segment."""
    logits_BSV = model(Tokens(drawn.ids_BS, torch.arange(len(drawn.ids_BS)))).logits_BSV
    return logits_BSV.gather(1, drawn.places_BP.unsqueeze(2).expand(-1, -1, logits_BSV.shape[2]))
