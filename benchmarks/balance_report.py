"""What benchmarks/balance.py writes: a table in Markdown and a chart."""

import argparse
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files without a display

import matplotlib.pyplot as plt
from balance_rows import RowResult
from reports import processor

_SMOOTHED_STEPS = 5


def markdown_report(
    results: Sequence[RowResult], claims: Sequence[dict[str, Any]], options: argparse.Namespace, config: Path
) -> str:
    """The table, what it shows, and how it was made."""
    lines = [
        "| balanced by | w_importance | w_load | loss | CV(importance) | CV(load) | max/mean | MaxVio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        weights = f"{row.w_importance:g} | {row.w_load:g}" if row.method.startswith("noisy_topk") else "- | -"
        lines.append(
            f"| {_title(row)} | {weights} | {row.loss:.3f} | {row.cv_importance:.2f} | {row.cv_load:.2f} | "
            f"{row.max_over_mean:.2f} | {row.max_violation:.2f} |"
        )
    seconds = sum(row.seconds for row in results) / options.jobs
    lines += [
        "",
        "Loss: held-out cross-entropy at the end, nats a token. The others: means over the last tenth of the steps, of "
        "figures formed step by step from all tokens of the step.",
        "",
        *(f"- {'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}" for claim in claims),
        "",
        f"`python benchmarks/balance.py --steps {options.steps} --seed {options.seed}` with the model of "
        f"`benchmarks/{config.name}` (32 experts, K = 4) on the source text of Python's standard library; about "
        f"{seconds / 60:.0f} minutes on {options.jobs} cores of {processor()}, torch {version('torch')}.",
        "",
    ]
    return "\n".join(lines)


def draw_chart(results: Sequence[RowResult]) -> bytes:
    """A PNG: MaxVio over the steps of every row, and its loss beside how unevenly the experts were used at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    for row, color in zip(results, colors):
        style = "-" if row.method.startswith("noisy_topk") else "--"
        label = f"{_title(row)} ({row.w_importance:g}, {row.w_load:g})" if style == "-" else _title(row)
        left.plot(_smoothed(row.violations), style, color=color, label=label, linewidth=1.6)
        marker = "o" if style == "-" else "s"
        right.scatter(row.max_over_mean, row.loss, color=color, marker=marker, s=70, zorder=3)
    left.axhline(0.1, color="gray", linewidth=0.8, linestyle=":")
    left.set(yscale="log", xlabel="step", ylabel="MaxVio", title=f"MaxVio (mean of {_SMOOTHED_STEPS} steps)")
    right.set(xscale="log", xlabel="max/mean tokens of an expert", ylabel="held-out loss, nats a token")
    right.set_title("at the end of the run")
    ticks = [1, 1.2, 1.5, 2, 3, 5, 8]
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()


def _title(row: RowResult) -> str:
    router, by = row.method.split(", ")
    by = "nothing" if by == "none" else by
    return by if router == "noisy_topk" else f"{by}, {router}"


def _smoothed(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, end - _SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
