"""What the plan_check benchmark shows: a page with planned and measured figures beside each other."""

from collections.abc import Sequence
from typing import Any

from benchmarks.plan_check.rows import RowResult
from benchmarks.runner.results import claim_lines, markdown_table

_HEADS = ("setting", "ranks", "EP", "ZeRO", "states", "peak", "all-to-all", "step", "largest term")


def markdown_report(rows: Sequence[RowResult], claims: Sequence[dict[str, Any]], about: Sequence[str]) -> str:
    """The table as a page.

    Args:
        rows: Rows of the table.
        claims: Claims, each with whether it holds.
        about: Lines that tell how it was made.
    """
    lines = ["# Plan against reality", "", *about, "", *markdown_table(_HEADS, [_cells(row) for row in rows])]
    lines += ["", "Each cell: planned / measured, difference.", "", *claim_lines(claims)]
    return "\n".join(lines) + "\n"


def _cells(row: RowResult) -> list[str]:
    cells = [row.name, row.ranks, str(row.layout["expert_parallel_size"]), str(row.layout["zero_stage"])]
    for name in ("states", "peak", "all_to_all"):
        if row.measured[name]:
            cells.append(f"{row.planned[name] / 1e6:,.1f} / {row.measured[name] / 1e6:,.1f} MB, {row.off[name]:+.1%}")
        else:
            cells.append("none")
    cells.append(f"{row.planned['seconds']:.3f} / {row.measured['seconds']:.3f} s, {row.off['seconds']:+.1%}")
    return [*cells, row.largest_term]
