"""What the scaling benchmark shows: a table in Markdown and a chart."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.runner.results import claim_lines, machine_words, markdown_table, new_figure, png_of
from benchmarks.scaling.rows import AXES, FEW_EXPERTS, MOST_GROWTH, RowResult, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADS = ("axis", "size", "T", "E", "layers", "parameters", "forward, ms", "both, ms", "of the first")
_LABELS = {"experts": "experts", "tokens": "tokens of a micro-batch", "layers": "layers"}


def markdown_report(found: Sequence[Series], claims: Sequence[dict[str, Any]], figures: dict[str, Any]) -> str:
    """How it was made, the table, the slopes, and what it shows."""
    lines = [f"{machine_words(figures['machine'])}, {figures['dtype']}.", ""]
    lines += markdown_table(_HEADS, [_cells(row) for series in found for row in series.rows])
    lines += ["", *(f"Slope {_slope(series)}." for series in found)]
    lines += [
        "",
        f"Forward and backward, router included; medians of {figures['rounds']} rounds, in each of which every size of "
        "an axis has its turn; of the first: median of the ratios of each round. Slope: the exponent of the power law "
        "that fits best (least squares of the logarithms).",
        "",
        *figures["what"],
        "",
        *claim_lines(claims),
        "",
    ]
    return "\n".join(lines)


def draw_chart(found: Sequence[Series]) -> bytes:
    """A PNG: a panel for each axis, both scales logarithmic, that of time shared: what is as steep grows as fast."""
    axes_names = list(dict.fromkeys(series.axis for series in found))
    figure, panels = new_figure(len(axes_names), 4.6 * len(axes_names), 5, sharey=True)
    for name, panel in zip(axes_names, panels, strict=True):
        _draw_axis(panel, name, [series for series in found if series.axis == name])
    times = [row.ms for series in found for row in series.rows]
    octaves = range(math.floor(math.log2(min(times))), math.ceil(math.log2(max(times))) + 1)
    panels[0].set_yticks([2.0**octave for octave in octaves], [f"{2.0**octave:g}" for octave in octaves])
    panels[0].set_ylim(2.0 ** octaves[0], 2.0 ** octaves[-1])
    panels[0].set_ylabel("forward and backward, ms")
    return png_of(figure)


def _draw_axis(panel: "Axes", name: str, members: Sequence[Series]) -> None:
    sizes = [row.size for row in members[0].rows]
    for series in members:
        times = [row.ms for row in series.rows]
        where = f"T {series.tokens:,}: " if name == "experts" else ""
        (line,) = panel.plot(sizes, times, "o-", label=f"{where}slope {series.slope:.2f}")
        if name == "experts" and sizes[0] == FEW_EXPERTS:
            panel.fill_between(sizes, times[0], times[0] * (1 + MOST_GROWTH), color=line.get_color(), alpha=0.15, lw=0)
    times = [row.ms for row in members[-1].rows]
    if name != "experts":
        ideal = [times[0] * size / sizes[0] for size in sizes]
        panel.plot(sizes, ideal, ":", color="gray", label="slope 1")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    title = "MoE layer" if members[0].rows[0].layers == 0 else "model"
    panel.set(xlabel=f"{AXES[name]}, {_LABELS[name]}", title=title)
    panel.legend(fontsize=8)


def _cells(row: RowResult) -> list[str]:
    layers = str(row.layers) if row.layers else "-"
    cells = [row.axis, f"{row.size:,}", f"{row.tokens:,}", f"{row.experts}", layers, f"{row.parameters / 1e6:.1f} M"]
    return [*cells, f"{row.forward_ms:.0f}", f"{row.ms:.0f}", f"{row.ratio:.2f}"]


def _slope(series: Series) -> str:
    where = f" at T = {series.tokens:,}" if series.axis == "experts" else ""
    return f"in {AXES[series.axis]}{where}: {series.slope:.2f}"
