"""Rows of the speculative benchmark: what was measured of a target, a draft, a temperature and a number of tokens."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.runner.rounds import median_ratio
from benchmarks.speculative.formula import expected_speedup, expected_tokens

LEAST_SPEEDUP = 1.5  # of the dense target with its trained draft, greedy, one text at a time
LEAST_PARAMETERS = 100_000_000  # of the dense target: a small model is not what a draft is for
FORMULA_TOLERANCE = 0.10
TIE_GAP = 1e-3  # a smaller difference of two logits in fp32 is a tie, which rounding decides


@dataclass(frozen=True)
class Setting:
    """What is measured together.

    Attributes:
        target: Name of the target: dense or sparse.
        draft: Name of the draft: draft, or self:K.
        temperature: Sampling temperature; 0 is greedy.
        draft_tokens: N, tokens that the draft proposes per round.
    """

    target: str
    draft: str
    temperature: float
    draft_tokens: int


@dataclass(frozen=True)
class Measured:
    """One turn of a setting, or of plain decoding, over all prompts.

    Attributes:
        seconds: Seconds after the first token of each text.
        tokens: New tokens after the first of each text.
        rounds: Rounds; of plain decoding the steps.
        examined: Proposed tokens up to the first rejection, that one included.
        accepted: Proposed tokens that stayed.
        draft_seconds: Seconds of the draft.
        target_seconds: Seconds of the target; of plain decoding all.
    """

    seconds: float
    tokens: int
    rounds: int
    examined: int
    accepted: int
    draft_seconds: float
    target_seconds: float


@dataclass(frozen=True)
class Difference:
    """The first token at which a greedy text is not the plain one.

    Attributes:
        place: Number of the new token, from 0.
        gap: Logit of the plain text's token less that of the other one.
    """

    place: int
    gap: float


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        target: Name of the target.
        draft: Name of the draft.
        temperature: Sampling temperature.
        draft_tokens: N, tokens proposed per round.
        acceptance: a, share of the examined tokens that stayed.
        tokens_per_round: Mean tokens that a round gave.
        expected_tokens: The same by the formula.
        draft_cost: c, seconds of a draft step over those of a plain step of the target.
        verify_cost: v, seconds of a check of N + 1 tokens over those of a plain step.
        speedup: Tokens per second over those of plain decoding, median of the rounds.
        formula: The same by the formula with a, c and v.
        textbook: The same by the formula with v = 1.
        tokens_per_second: Speed, median of the rounds.
    """

    target: str
    draft: str
    temperature: float
    draft_tokens: int
    acceptance: float
    tokens_per_round: float
    expected_tokens: float
    draft_cost: float
    verify_cost: float
    speedup: float
    formula: float
    textbook: float
    tokens_per_second: float


def result_row(setting: Setting, found: Sequence[Measured], plain: Sequence[Measured]) -> Row:
    """Make the row of a setting from its rounds and those of plain decoding at the same temperature."""
    first, number = found[0], setting.draft_tokens  # every round gives the same texts
    rate = first.accepted / max(1, first.examined)
    draft_cost, verify_cost = (
        statistics.median(
            getattr(ours, name) / (ours.rounds * steps) / (theirs.seconds / theirs.rounds)
            for ours, theirs in zip(found, plain, strict=True)
        )
        for name, steps in (("draft_seconds", number), ("target_seconds", 1))
    )
    speeds, plain_speeds = ([turn.tokens / turn.seconds for turn in turns] for turns in (found, plain))
    return Row(
        target=setting.target,
        draft=setting.draft,
        temperature=setting.temperature,
        draft_tokens=number,
        acceptance=rate,
        tokens_per_round=1 + first.accepted / first.rounds,
        expected_tokens=expected_tokens(rate, number),
        draft_cost=draft_cost,
        verify_cost=verify_cost,
        speedup=median_ratio(speeds, plain_speeds),
        formula=expected_speedup(rate, number, draft_cost, verify_cost),
        textbook=expected_speedup(rate, number, draft_cost),
        tokens_per_second=statistics.median(speeds),
    )


def claims_of(
    rows: Sequence[Row],
    differences: Sequence[Difference],
    texts: int,
    parameters: dict[str, int],
    wide: tuple[int, int],
) -> list[dict[str, Any]]:
    """What the benchmark is to show, and whether this run of it does.

    Args:
        rows: All rows.
        differences: Where greedy texts part from the plain ones.
        texts: Number of greedy texts that were compared.
        parameters: Number of parameters of each model.
        wide: Number of greedy texts in fp64 that part from the plain ones, and of all that were compared.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    greedy = [row for row in rows if (row.target, row.draft, row.temperature) == ("dense", "draft", 0.0)]
    best = max(greedy, key=lambda row: row.speedup)
    sparse = [row for row in rows if row.target == "sparse"]
    worst = max(sparse, key=lambda row: abs(row.speedup / row.formula - 1))
    widest = max((difference.gap for difference in differences), default=0.0)
    return [
        {
            "claim": f"A dense target of {parameters['dense'] / 1e6:.1f} M parameters (at least "
            f"{LEAST_PARAMETERS / 1e6:.0f} M) with a trained draft of {parameters['draft'] / 1e6:.1f} M decodes "
            f"greedily, one text at a time, at least {LEAST_SPEEDUP:g} times as fast as without: "
            f"{best.speedup:.2f} times with {best.draft_tokens} proposed tokens.",
            "holds": best.speedup >= LEAST_SPEEDUP and parameters["dense"] >= LEAST_PARAMETERS,
        },
        {
            "claim": f"With MoE layers the speed is within {FORMULA_TOLERANCE:.0%} of the formula with measured "
            f"acceptance and costs: at worst {worst.speedup:.2f} in place of {worst.formula:.2f} ({worst.draft}, "
            f"temperature {worst.temperature:g}, {worst.draft_tokens} tokens).",
            "holds": abs(worst.speedup / worst.formula - 1) <= FORMULA_TOLERANCE,
        },
        {
            "claim": f"Greedy text is the target's own: of {texts} texts in fp32 {len(differences)} part from it"
            + (f", at logits at most {widest:.1e} apart." if differences else "."),
            "holds": widest < TIE_GAP,
        },
        {
            "claim": f"In fp64 greedy text is the target's own to the last token: of {wide[1]} texts {wide[0]} part.",
            "holds": wide[0] == 0 < wide[1],
        },
    ]
