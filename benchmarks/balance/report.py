"""What the balance benchmark shows: a table in Markdown and a chart."""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.balance.rows import CONFIG, RowResult
from benchmarks.runner.processes import ROOT
from benchmarks.runner.results import claim_lines, machine_words, markdown_table, new_figure, png_of

_SMOOTHED_STEPS = 5


def markdown_report(
    results: Sequence[RowResult],
    claims: Sequence[dict[str, Any]],
    options: argparse.Namespace,
    machine: dict[str, Any],
) -> str:
    """The table, what it shows, and how it was made."""
    heads = ["balanced by", "w_importance", "w_load", "loss", "CV(importance)", "CV(load)", "max/mean", "MaxVio"]
    rows = []
    for row in results:
        is_noisy = row.method.startswith("noisy_topk")
        weights = [f"{weight:g}" if is_noisy else "-" for weight in (row.w_importance, row.w_load)]
        figures = (row.cv_importance, row.cv_load, row.max_over_mean, row.max_violation)
        rows.append([_title(row), *weights, f"{row.loss:.3f}", *(f"{figure:.2f}" for figure in figures)])
    seconds = sum(row.seconds for row in results) / options.jobs
    lines = [
        *markdown_table(heads, rows),
        "",
        "Loss: held-out cross-entropy at the end, nats per token. The others: means over the last tenth of the steps, "
        "of figures formed step by step from all tokens of the step.",
        "",
        *claim_lines(claims),
        "",
        f"`python -m benchmarks.balance --steps {options.steps} --seed {options.seed}` with the model of "
        f"`{CONFIG.relative_to(ROOT)}` (32 experts, K = 4) on the source text of Python's standard library; about "
        f"{seconds / 60:.0f} minutes, {options.jobs} runs at a time, on {machine_words(machine)}.",
        "",
    ]
    return "\n".join(lines)


def draw_chart(results: Sequence[RowResult]) -> bytes:
    """A PNG: MaxVio of every row over the steps, and loss over the imbalance of the experts at the end."""
    figure, (left, right) = new_figure(2, 12, 4.8)
    for number, row in enumerate(results):
        color = f"C{number}"
        style = "-" if row.method.startswith("noisy_topk") else "--"
        label = f"{_title(row)} ({row.w_importance:g}, {row.w_load:g})" if style == "-" else _title(row)
        left.plot(_smoothed(row.violations), style, color=color, label=label, linewidth=1.6)
        marker = "o" if style == "-" else "s"
        right.scatter(row.max_over_mean, row.loss, color=color, marker=marker, s=70, zorder=3)
    left.axhline(0.1, color="gray", linewidth=0.8, linestyle=":")
    left.set(yscale="log", xlabel="step", ylabel="MaxVio", title=f"MaxVio (mean of {_SMOOTHED_STEPS} steps)")
    right.set(xscale="log", xlabel="max/mean tokens of an expert", ylabel="held-out loss, nats per token")
    right.set_title("at the end of the run")
    ticks = [1, 1.2, 1.5, 2, 3, 5, 8]
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return png_of(figure)


def _title(row: RowResult) -> str:
    router, by = row.method.split(", ")
    by = "nothing" if by == "none" else by
    return by if router == "noisy_topk" else f"{by}, {router}"


def _smoothed(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, end - _SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
