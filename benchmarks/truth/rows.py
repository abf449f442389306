"""How the truth benchmark judges: a case's numbers against those of its reference, the same for every system."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.train.rows import OURS
from benchmarks.truth.cases import AUTOEP, CONTROL, REFERENCE, Case, not_offered
from benchmarks.truth.systems import CaseFailed, Numbers
from moe_train.train.parity import Bounds, compare

# Relative, of each tensor. After 20 steps, layouts that agree are 5e-6 apart at most; clipping by a norm that is 6% too
# small makes 1e-2.
WEIGHT_TOLERANCE = 1e-3
SAME, OTHER, FAILED, NOT_OFFERED = "same", "other numbers", "failed", "not offered"
_ISSUES = "https://github.com/{}/issues/{}"


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        system: Name of the system.
        case: Code of the case.
        terms: Name of the losses.
        kind: SAME, OTHER, FAILED or NOT_OFFERED.
        loss: Largest relative difference of a step's loss; None: there are no numbers.
        grad_norm: Largest relative difference of a step's gradient norm.
        weights: Largest relative difference of a tensor after the last step.
        beyond: Names of those that are beyond their bounds.
        reason: Why there are no numbers.
    """

    system: str
    case: str
    terms: str
    kind: str
    loss: float | None = None
    grad_norm: float | None = None
    weights: float | None = None
    beyond: tuple[str, ...] = ()
    reason: str = ""

    @property
    def command(self) -> str:
        """Command that runs this case alone."""
        return f"python -m benchmarks.truth --systems {self.system} --terms {self.terms} --cases {self.case}"

    @property
    def is_bad(self) -> bool:
        """Whether the system offers the case and does not keep the numbers."""
        return self.kind in (OTHER, FAILED)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"command": self.command, "cause": cause_of(self)}


def judge(system: str, case: Case, terms: str, numbers: Numbers, reference: Numbers) -> Verdict:
    """Compare a case's numbers with the reference.

    Args:
        system: Name of the system.
        case: The case.
        terms: Name of the losses.
        numbers: What the case gave.
        reference: What it should have given.
    """
    bounds = Bounds()  # those of `moe-train parity` in fp32
    found = compare(case.layout, numbers.records, reference.records, bounds)
    weights = weight_difference(numbers.weights, reference.weights)
    beyond = [
        name
        for name, difference, bound in (
            ("loss", found.loss_difference, bounds.loss),
            ("gradient norm", found.grad_norm_difference, bounds.grad_norm),
            ("weights", weights, WEIGHT_TOLERANCE),
        )
        if not difference <= bound
    ]
    if found.passed and not beyond:
        kind = SAME
    else:
        kind = OTHER
        beyond = beyond or ["steps"]
    return Verdict(
        system,
        case.code,
        terms,
        kind,
        found.loss_difference,
        found.grad_norm_difference,
        weights,
        tuple(beyond),
    )


def weight_difference(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of a tensor relative to its norm; infinite where one lacks or has another shape.

    Args:
        weights: Weights by name.
        expected: What they should be.
    """
    if weights.keys() != expected.keys():
        return math.inf
    worst = 0.0
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            return math.inf
        away = float(torch.linalg.vector_norm(weights[name].double() - value.double()))
        size = float(torch.linalg.vector_norm(value.double()))
        difference = away / size if size else (0.0 if away == 0 else math.inf)
        if not math.isfinite(difference):
            return math.inf
        worst = max(worst, difference)
    return worst


def judge_cases(
    system: str, cases: Sequence[Case], terms: str, run: Callable[[Case], Numbers], told: Callable[[Verdict], object]
) -> list[Verdict]:
    """Run and judge cases of a system with one set of losses.

    A layout is compared with one process; what goes on from a checkpoint with the run that was never stopped.

    Args:
        system: Name of the system.
        cases: The cases.
        terms: Name of the losses.
        run: Runs a case.
        told: Called with each verdict.

    Raises:
        CaseFailed: The reference itself failed.
    """
    known: dict[str, Numbers] = {}

    def numbers_of(case: Case) -> Numbers:
        if case.code not in known:
            known[case.code] = run(case)
        return known[case.code]

    verdicts = []
    for case in cases:
        reference = Case(REFERENCE if case.saved_by is None else case.saved_by)
        reason = not_offered(system, case)
        if reason is not None:
            verdict = Verdict(system, case.code, terms, NOT_OFFERED, reason=reason)
        else:
            expected = numbers_of(reference)
            try:
                verdict = judge(system, case, terms, numbers_of(case), expected)
            except CaseFailed as failure:
                verdict = Verdict(system, case.code, terms, FAILED, reason=str(failure))
        verdicts.append(verdict)
        told(verdict)
    return verdicts


def cause_of(verdict: Verdict) -> str:
    """Cause of what a system does not keep, where it is known, with the public issue that says so; empty: unknown.

    Args:
        verdict: Verdict of a case.
    """
    if not verdict.is_bad or verdict.system == OURS or verdict.case == CONTROL:
        return ""
    saved_by, _, layout = verdict.case.rpartition("-")
    ep_size = int(layout[2])
    if not saved_by and "z0" in layout and ep_size > 1 and "gradient norm" in verdict.beyond:
        issue = _ISSUES.format("deepspeedai/DeepSpeed", 8475)
        return f"the fp32 norm of ZeRO 0 is averaged over ranks that have different experts: {issue}"
    if saved_by and verdict.system == AUTOEP and "z3" in layout and verdict.kind == OTHER:
        return (
            "after a universal load under ZeRO 3 all sub-groups share one tensor of Adam's step, which each counts up "
            "(stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3); no public issue found"
        )
    if not saved_by and verdict.terms == "balance" and verdict.kind == OTHER:
        return "the balance loss is of a rank's micro-batch, by design, and not of the step's tokens"
    return ""


def claims_of(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """What the check is to show of this project, and whether this run of it does."""
    own = [each for each in verdicts if each.system == OURS and each.kind != NOT_OFFERED]
    if not own:
        return []
    bad = [each for each in own if each.is_bad]
    words = f"{OURS} keeps its numbers in {len(own) - len(bad)} of {len(own)} cases."
    return [{"claim": words, "holds": not bad}]
