"""What the long_context benchmark shows: a table in Markdown and a chart."""

from collections.abc import Sequence
from typing import Any

from benchmarks.long_context.documents import WINDOW
from benchmarks.long_context.recompute import LENGTH, MODEL, RecomputeRow
from benchmarks.long_context.rows import HEAD_DIM, HEADS, KINDS, KV_HEADS, MASKED, SHARED, STEPPED, Point
from benchmarks.runner.results import claim_lines, machine_words, markdown_table, new_figure, png_of

_SHOWN = (*KINDS, MASKED, STEPPED, *SHARED.values())


def markdown_report(
    points: Sequence[Point],
    recomputed: Sequence[RecomputeRow],
    claims: Sequence[dict[str, Any]],
    figures: dict[str, Any],
) -> str:
    """How it was made, the tables, and what they show."""
    lengths = sorted({point.length for point in points})
    found = {(point.kind, point.length): point for point in points}
    memory, times = [], []
    for kind in _SHOWN:
        own = [found.get((kind.name, length)) for length in lengths]
        memory.append([kind.name, *("-" if point is None else f"{point.peak_bytes / 2**20:,.1f}" for point in own)])
        times.append([kind.name, *("-" if point is None else f"{point.cpu_seconds:,.2f}" for point in own)])
    heads = [f"{length:,}" for length in lengths]
    lines = [
        f"{machine_words(figures['machine'])}, fp32.",
        "",
        *markdown_table(["MiB at S tokens", *heads], memory),
        "",
        *markdown_table(["CPU seconds at S tokens", *heads], times),
        "",
        f"One row, forward and backward. Attention: {HEADS} query heads, {KV_HEADS} key heads of {HEAD_DIM}. Documents "
        f"have Zipf lengths from 16 tokens to the whole row, the same in every kind; the window is {WINDOW:,} "
        "positions. MiB: most bytes at one time beside inputs and weights, counted allocation by allocation. A step: "
        "two layers of width 32, 4 experts, every other layer with the window, cross-entropy. The wider one has width "
        "128, and ranks share the row (`parallel.context_parallel_size`): bytes and CPU time are those of the rank "
        "with most, the time is the median of 3.",
        "",
        *markdown_table(
            ["`train.recompute`", "MiB", "CPU time, none = 1"],
            [[row.way, f"{row.peak_bytes / 2**20:,.1f}", f"{row.time_ratio:.2f}"] for row in recomputed],
        ),
        "",
        f"A step, forward and backward, of one row of {LENGTH:,} tokens with documents: {MODEL['num_layers']} layers "
        f"of width {MODEL['hidden_size']}, all with {MODEL['moe']['num_experts']} experts of width "
        f"{MODEL['moe']['intermediate_size']}, of which a token takes {MODEL['moe']['top_k']}. MiB: beside weights and "
        "their gradients. CPU time: median ratio of rounds in which each has its turn.",
        "",
        *claim_lines(claims),
        "",
    ]
    return "\n".join(lines)


def draw_chart(points: Sequence[Point]) -> bytes:
    """A PNG: memory and time over the length."""
    figure, (left, right) = new_figure(2, 12, 5)
    for kind in _SHOWN:
        own = [point for point in points if point.kind == kind.name]
        lengths, style = [point.length for point in own], "--" if kind.is_masked else "-"
        left.loglog(lengths, [point.peak_bytes / 2**20 for point in own], style, marker="o", label=kind.name)
        right.loglog(lengths, [point.cpu_seconds for point in own], style, marker="o", label=kind.name)
    left.set(xlabel="tokens of a row", ylabel="MiB, forward and backward", title="Memory")
    right.set(xlabel="tokens of a row", ylabel="CPU seconds, forward and backward", title="Time of one thread")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return png_of(figure)
