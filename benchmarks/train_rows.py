"""The rows of benchmarks/train.py: sizes, what was measured of each system, and what that shows."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

OURS, ZERO1, AUTOEP = "moe_train", "hf_zero1", "hf_autoep"
PEERS = (ZERO1, AUTOEP)
# Of the experts: transformers' experts_implementation, without batched_mm, which copies an expert's weights for every
# token; and AutoEP's gate_up_impl.
FORMS = {ZERO1: ("grouped_mm", "eager"), AUTOEP: ("fused", "separate")}
LEAST_GAIN = 1.5  # over each peer
GAIN_FROM_RANKS = 2
WARM_UP_STEPS = 10  # of every run, not timed
STEPS_A_RECORD = 5  # of our trainer, where 10 is the default: it writes twice as much as it would


@dataclass(frozen=True)
class Setting:
    """What all systems have in common.

    Attributes:
        hidden: hidden_size.
        layers: Blocks, each with an MoE layer.
        heads: Query heads.
        kv_heads: Key and value heads.
        experts: Of one layer, over all ranks.
        top_k: Experts of a token.
        inner: intermediate_size of an expert.
        vocabulary: Entries of the tokenizer and rows of the embedding.
        sequence: Tokens of a sequence.
        micro_batch: Sequences of a rank in a step.
        ranks: Processes.
        threads: Of a rank.
        dtype: bf16 or fp32.
        steps: Timed steps of a run.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    inner: int
    vocabulary: int
    sequence: int
    micro_batch: int
    ranks: int
    threads: int
    dtype: str
    steps: int

    @property
    def global_batch(self) -> int:
        """Sequences of a step, over all ranks."""
        return self.micro_batch * self.ranks

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.global_batch * self.sequence


@dataclass(frozen=True)
class Outcome:
    """What one run of a system gave.

    Attributes:
        seconds: Wall time of the timed steps.
        parameters: Of the whole model.
        cross_entropy: Of the last step, nats a token, over all ranks, without the router's loss.
    """

    seconds: float
    parameters: int
    cross_entropy: float


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        system: Its name.
        tokens_per_second: Of all ranks together; median of the rounds.
        quartiles: Its lower and upper quartile.
        ratio: Median of the rounds' ratios of moe_train's tokens/s to its own; None: moe_train was not measured.
        ratio_quartiles: Its lower and upper quartile.
        parameters: Of the whole model.
        cross_entropy: Of the last step, nats a token; the same in every round.
        detail: What it runs with that the others do not.
    """

    system: str
    tokens_per_second: float
    quartiles: tuple[float, float]
    ratio: float | None
    ratio_quartiles: tuple[float, float] | None
    parameters: int
    cross_entropy: float
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def rows_of(setting: Setting, outcomes: dict[str, Sequence[Outcome]], details: dict[str, str]) -> list[RowResult]:
    """The rows, in the order of `outcomes`.

    Args:
        setting: The sizes.
        outcomes: By system, of every round.
        details: By system.
    """
    tokens = setting.tokens_per_step * setting.steps
    rates = {name: [tokens / outcome.seconds for outcome in own] for name, own in outcomes.items()}
    rows = []
    for name, own in rates.items():
        ratios = [a / b for a, b in zip(rates[OURS], own, strict=True)] if OURS in rates else None
        last = outcomes[name][-1]
        rows.append(
            RowResult(
                system=name,
                tokens_per_second=statistics.median(own),
                quartiles=quartiles(own),
                ratio=statistics.median(ratios) if ratios else None,
                ratio_quartiles=quartiles(ratios) if ratios else None,
                parameters=last.parameters,
                cross_entropy=last.cross_entropy,
                detail=details.get(name, ""),
            )
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; of fewer than two values, the value itself."""
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def claims_of(setting: Setting, rows: Sequence[RowResult]) -> list[dict[str, Any]]:
    """What the measurement is to show, and whether this run of it does; nothing of what was not measured.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    claims = []
    for row in rows:
        if row.system in PEERS and row.ratio is not None and setting.ranks >= GAIN_FROM_RANKS:
            assert row.ratio_quartiles is not None, "it comes with the ratio"
            lower, upper = row.ratio_quartiles
            words = f"On {setting.ranks} ranks {OURS} trains at least {LEAST_GAIN:g} times as fast as {row.system}: "
            words += f"{row.ratio:.2f} times (quartiles {lower:.2f} to {upper:.2f})."
            claims.append({"claim": words, "holds": row.ratio >= LEAST_GAIN})
    if len(rows) > 1:
        counts = {row.parameters for row in rows}
        words = "All systems train a model of the same number of parameters: "
        words += ", ".join(f"{count:,}" for count in sorted(counts)) + "."
        claims.append({"claim": words, "holds": len(counts) == 1})
    return claims
