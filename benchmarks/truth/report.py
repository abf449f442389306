"""What the truth benchmark shows: who keeps the numbers where, and each failure with the command that gives it."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.runner.results import claim_lines, markdown_table
from benchmarks.truth.cases import CONTROL, TITLES
from benchmarks.truth.rows import FAILED, NOT_OFFERED, SAME, Verdict, cause_of

_GROUPS: tuple[tuple[str, Callable[[Verdict], bool]], ...] = (
    ("learning rate a millionth larger", lambda each: each.case == CONTROL),
    ("layouts, cross-entropy", lambda each: _is_layout(each) and each.terms == "plain"),
    ("EP over ranks", lambda each: _is_layout(each) and each.terms == "plain" and int(each.case[2]) > 1),
    *(
        (
            f"ZeRO {stage}",
            lambda each, stage=stage: _is_layout(each) and each.terms == "plain" and each.case[4] == stage,
        )
        for stage in "0123"
    ),
    (
        "accumulation 2, 4",
        lambda each: _is_layout(each) and each.terms == "plain" and not each.case.endswith("a1"),
    ),
    ("layouts, with the balance loss", lambda each: _is_layout(each) and each.terms == "balance"),
    ("saved and gone on, as it was", lambda each: _is_resume(each) and _same_layout(each.case)),
    ("saved and gone on in another layout", lambda each: _is_resume(each) and not _same_layout(each.case)),
)


def _is_layout(verdict: Verdict) -> bool:
    return "-" not in verdict.case and verdict.case != CONTROL


def _is_resume(verdict: Verdict) -> bool:
    return "-" in verdict.case


def _same_layout(code: str) -> bool:
    saved_by, _, layout = code.partition("-")
    return saved_by == layout


def verdict_line(verdict: Verdict) -> str:
    """One line about a verdict, for people who wait."""
    if verdict.loss is None:
        figures = verdict.reason
    else:
        figures = f"loss {verdict.loss:.1e}, gradient norm {verdict.grad_norm:.1e}, weights {verdict.weights:.1e}"
    return f"{verdict.system} {verdict.terms} {verdict.case}: {verdict.kind}: {figures}"


def markdown_report(verdicts: Sequence[Verdict], claims: Sequence[dict[str, Any]], about: Sequence[str]) -> str:
    """The tables as a page.

    Args:
        verdicts: Verdicts of all cases.
        claims: Claims, each with whether it holds.
        about: Lines that tell how it was made.
    """
    systems = list(dict.fromkeys(each.system for each in verdicts))
    lines = ["# Who keeps the numbers where", "", *about, ""]
    lines += markdown_table(["", *(TITLES[system] for system in systems)], _summary(verdicts, systems))
    lines += [
        "",
        "Cells: cases that keep the numbers, of those that the system offers. Largest differences: of these.",
        "",
    ]
    bad = failures(verdicts)
    if bad:
        heads = ("system", "losses", "cases", "what differs", "cause, where known", "one of them")
        lines += ["## What is not kept", "", *markdown_table(heads, bad), ""]
    missing = _not_offered(verdicts)
    if missing:
        lines += ["## Not offered", "", *missing, ""]
    return "\n".join([*lines, *claim_lines(claims)]) + "\n"


def _summary(verdicts: Sequence[Verdict], systems: Sequence[str]) -> list[list[str]]:
    rows = []
    for title, belongs in _GROUPS:
        if any(belongs(each) for each in verdicts):
            rows.append(
                [title, *(_count([v for v in verdicts if v.system == name and belongs(v)]) for name in systems)]
            )
    for field in ("loss", "grad_norm", "weights"):
        cells = []
        for name in systems:
            values = [getattr(each, field) for each in verdicts if each.system == name and each.kind == SAME]
            cells.append(f"{max(values):.1e}" if values else "-")
        rows.append([f"largest difference, {field.replace('grad_norm', 'gradient norm')}", *cells])
    return rows


def _count(verdicts: Sequence[Verdict]) -> str:
    offered = [each for each in verdicts if each.kind != NOT_OFFERED]
    if not offered:
        return "not offered" if verdicts else "-"
    return f"{sum(each.kind == SAME for each in offered)} of {len(offered)}"


def failures(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Rows of what is not kept: cases of one system that fail in the same way are one row.

    Args:
        verdicts: Verdicts of all cases.
    """
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for each in verdicts:
        if each.is_bad:
            cause = cause_of(each)
            way = each.reason if each.kind == FAILED else "" if cause else ", ".join(each.beyond)
            groups.setdefault((each.system, each.terms, each.kind, way, cause), []).append(each)
    rows = []
    for (system, terms, kind, way, cause), same in groups.items():
        shown = f"{kind}: {way}" if kind == FAILED else _differences(same)
        command = f"`{same[0].command}`"
        codes = ", ".join(each.case for each in same)
        rows.append(
            [TITLES[system], terms, f"{len(same)}: {codes}", shown.replace("|", "\\|"), cause or "unknown", command]
        )
    return rows


def _differences(same: Sequence[Verdict]) -> str:
    names = [
        name for name in ("loss", "gradient norm", "weights", "steps") if any(name in each.beyond for each in same)
    ]
    parts = []
    for name in names:
        values = [
            getattr(each, name.replace("gradient norm", "grad_norm"), None) for each in same if name in each.beyond
        ]
        figures = [value for value in values if value is not None]
        parts.append(f"{name} by up to {max(figures):.1e}" if figures else name)
    return ", ".join(parts)


def _not_offered(verdicts: Sequence[Verdict]) -> list[str]:
    reasons = {(each.system, each.reason): 0 for each in verdicts if each.kind == NOT_OFFERED}
    return [f"- {TITLES[system]}: {reason}" for system, reason in reasons]
