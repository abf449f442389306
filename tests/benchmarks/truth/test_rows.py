"""How the truth benchmark judges: what is the same, what is not, and what a system does not offer."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.train.rows import OURS
from benchmarks.truth.cases import (
    AUTOEP,
    CONTROL,
    DEEPSPEED_MOE,
    GRID,
    HF,
    RESUMES,
    SYSTEMS,
    Case,
    Task,
    default_cases,
    not_offered,
    read_case,
)
from benchmarks.truth.rows import (
    FAILED,
    NOT_OFFERED,
    OTHER,
    SAME,
    WEIGHT_TOLERANCE,
    Verdict,
    cause_of,
    claims_of,
    judge,
    judge_cases,
    weight_difference,
)
from benchmarks.truth.systems import CaseFailed, Numbers, last_words
from moe_train.config.errors import UsageError
from moe_train.train.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, NUM_STEPS

CASE = read_case("2x2z1a2")
WEIGHTS = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}


def numbers(loss: float = 1.0, norm: float = 1.0, weight: float = 1.0, steps: int = NUM_STEPS) -> Numbers:
    """A run whose last step and weights are so many times those of another one."""
    records = [{"step": step, "train/loss": 2.0, "train/grad_norm": 0.5} for step in range(1, steps + 1)]
    records[-1] |= {"train/loss": 2.0 * loss, "train/grad_norm": 0.5 * norm}
    return Numbers(records, {name: value * weight for name, value in WEIGHTS.items()})


@pytest.mark.parametrize(
    ("found", "beyond"),
    [
        (numbers(), ()),
        (
            numbers(1 + LOSS_TOLERANCE / 2, 1 - GRAD_NORM_TOLERANCE / 2, 1 + WEIGHT_TOLERANCE / 2),
            (),
        ),
        (numbers(loss=1 + 2 * LOSS_TOLERANCE), ("loss",)),
        (numbers(norm=1 - 2 * GRAD_NORM_TOLERANCE), ("gradient norm",)),
        (numbers(weight=1 + 2 * WEIGHT_TOLERANCE), ("weights",)),
        (numbers(loss=math.nan, weight=math.nan), ("loss", "weights")),
        (numbers(steps=NUM_STEPS - 1), ("steps",)),
    ],
)
def test_every_figure_counts_at_every_step(found: Numbers, beyond: tuple[str, ...]) -> None:
    verdict = judge(AUTOEP, CASE, "plain", found, numbers())
    assert verdict.beyond == beyond
    assert (verdict.kind, verdict.is_bad) == ((OTHER, True) if beyond else (SAME, False))


def test_weights_must_have_the_same_names_and_shapes() -> None:
    assert weight_difference(WEIGHTS, WEIGHTS) == 0.0
    assert weight_difference({"a": WEIGHTS["a"]}, WEIGHTS) == math.inf
    assert weight_difference(WEIGHTS | {"a": torch.ones(3)}, WEIGHTS) == math.inf
    assert weight_difference(WEIGHTS | {"b": torch.ones(2)}, WEIGHTS) == math.inf
    assert weight_difference(WEIGHTS | {"a": torch.tensor([3.0, 4.5])}, WEIGHTS) == pytest.approx(0.1)


def test_a_layout_is_held_against_one_process_and_a_resume_against_its_own_run() -> None:
    asked = []
    # Two ranks give twice the loss: in their layout that is another number, after a stop in it the same.
    given = {"1x1z1a1": numbers(), "2x1z1a1": numbers(loss=2.0), "2x1z1a1-1x1z1a1": numbers(loss=2.0)}

    def run(case: Case) -> Numbers:
        asked.append(case.code)
        return given[case.code]

    cases = [read_case("2x1z1a1"), read_case("2x1z1a1-1x1z1a1")]
    verdicts = judge_cases(OURS, cases, "plain", run, lambda _: None)
    assert [each.kind for each in verdicts] == [OTHER, SAME]
    assert asked == ["1x1z1a1", "2x1z1a1", "2x1z1a1-1x1z1a1"]  # none twice


def test_a_crash_is_a_failure_and_what_is_not_offered_is_none() -> None:
    def run(case: Case) -> Numbers:
        if case.layout.world_size == 2:
            raise CaseFailed("ValueError: no")
        return numbers()

    told: list[Verdict] = []
    judge_cases(HF, [read_case("2x1z1a1"), read_case("2x2z1a1")], "plain", run, told.append)
    assert [(each.kind, each.reason) for each in told] == [
        (FAILED, "ValueError: no"),
        (NOT_OFFERED, "no expert parallelism without AutoEP"),
    ]
    assert [each.is_bad for each in told] == [True, False]
    assert told[0].command == "python -m benchmarks.truth --systems hf_zero --terms plain --cases 2x1z1a1"


def test_a_reference_that_fails_is_an_error() -> None:
    def run(case: Case) -> Numbers:
        raise CaseFailed("no rank came up")

    with pytest.raises(CaseFailed, match="no rank came up"):
        judge_cases(HF, [read_case("2x1z1a1")], "plain", run, lambda _: None)


@pytest.mark.parametrize(
    ("system", "code", "offered"),
    [
        (OURS, "2x2z0a1", False),
        (OURS, "4x2z3a1-2x1z1a1", True),
        (AUTOEP, "4x4z3a4", True),
        (AUTOEP, "2x2z1a1-4x4z2a1", True),
        (AUTOEP, "2x1z1a1-2x1z3a1", False),
        (DEEPSPEED_MOE, "2x2z3a1", False),
        (DEEPSPEED_MOE, "2x2z1a1-2x2z1a1", True),
        (DEEPSPEED_MOE, "2x2z1a1-4x2z1a1", False),
        (DEEPSPEED_MOE, "2x1z1a1-4x1z1a1", True),
        (HF, "4x1z3a2", True),
        (HF, "4x2z1a1", False),
    ],
)
def test_what_is_offered(system: str, code: str, offered: bool) -> None:
    assert (not_offered(system, read_case(code)) is None) == offered


def test_codes_are_read_as_they_are_written() -> None:
    cases = [*GRID, *RESUMES, read_case(CONTROL)]
    assert [read_case(case.code) for case in cases] == cases
    assert len({case.code for case in cases}) == len(cases)
    task = Task(HF, CASE.layout, 1, 20, "records", "weights", load="there", is_universal=True)
    assert Task.from_json(task.as_json()) == task


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        ("plain", ("world_size", "expert_parallel_size", "zero_stage", "accumulation")),
        ("balance", ("world_size", "zero_stage", "accumulation")),
    ],
)
def test_a_slice_has_each_value_of_the_grid(terms: str, names: tuple[str, ...]) -> None:
    some, every = ([case.layout for case in default_cases(terms, whole)] for whole in (False, True))
    assert len(some) < len(every)
    for name in names:
        assert {getattr(layout, name) for layout in some} == {getattr(layout, name) for layout in every}, name
    assert default_cases(terms, whole=False)[0].is_control


@pytest.mark.parametrize("code", ["", "2x2", "2x4z1a1", "4x4z1a16", "3x1z1a1", "2x2z4a1", "2x2z1a1-", "a-b-c"])
def test_bad_codes_are_refused(code: str) -> None:
    with pytest.raises(UsageError, match="--cases"):
        read_case(code)


def test_causes_are_named_only_where_they_are_known() -> None:
    bad = Verdict(AUTOEP, "2x2z0a1", "plain", OTHER, 1e-3, 1e-1, 1e-2, ("loss", "gradient norm", "weights"))
    assert "issues/8475" in cause_of(bad)
    assert cause_of(replace(bad, case="2x1z0a1")) == ""  # all experts on each rank
    assert cause_of(replace(bad, case="2x2z1a1")) == ""
    assert cause_of(replace(bad, system=OURS)) == ""
    assert cause_of(replace(bad, kind=SAME, beyond=())) == ""
    assert "micro-batch" in cause_of(replace(bad, case="2x2z1a1", terms="balance"))
    assert cause_of(replace(bad, case=CONTROL, terms="balance")) == ""


def test_the_claim_is_about_this_project_alone() -> None:
    good, bad = Verdict(OURS, "2x2z1a1", "plain", SAME), Verdict(OURS, "2x2z2a1", "plain", FAILED)
    theirs = replace(bad, system=HF)
    assert [claim["holds"] for claim in claims_of([good, theirs])] == [True]
    assert [claim["holds"] for claim in claims_of([good, bad])] == [False]
    assert claims_of([theirs]) == []
    assert set(SYSTEMS) == {OURS, AUTOEP, DEEPSPEED_MOE, HF}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("a\nValueError: too small\n", "ValueError: too small"),
        (
            "[rank1]:   assert len(x) > 0\n[rank1]:    ^^^^^^\n[rank1]: AssertionError\n\n",
            "AssertionError: assert len(x) > 0",
        ),
        ("", ""),
    ],
)
def test_last_words_say_what_went_wrong(output: str, expected: str) -> None:
    assert last_words(output) == expected
