"""What the speculative benchmark shows: tables in Markdown and a chart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.runner.results import claim_lines, machine_words, markdown_table, new_figure, png_of
from benchmarks.speculative.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WORDS = {"dense": "dense target", "sparse": "target with MoE layers"}


def markdown_report(rows: Sequence[Row], claims: Sequence[dict[str, Any]], figures: dict[str, Any]) -> str:
    """How it was made, the tables, and what it shows."""
    heads = ["target", "draft", "temperature", "N", "a", "tokens per round", "formula", "c", "v", "speed", "formula"]
    heads += ["with v = 1", "tokens/s"]
    cells = [
        [
            *(row.target, row.draft, f"{row.temperature:g}", f"{row.draft_tokens}", f"{row.acceptance:.3f}"),
            *(f"{row.tokens_per_round:.2f}", f"{row.expected_tokens:.2f}"),
            *(f"{row.draft_cost:.3f}", f"{row.verify_cost:.2f}"),
            *(f"{row.speedup:.2f}", f"{row.formula:.2f}", f"{row.textbook:.2f}", f"{row.tokens_per_second:.1f}"),
        ]
        for row in rows
    ]
    parameters = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in figures["parameters"].items())
    touched = [
        [f"{n}", f"{found:.1f}", f"{figures['experts_formula'][n]:.1f}"] for n, found in figures["experts"].items()
    ]
    lines = [
        f"{machine_words(figures['machine'])}, fp32; one text at a time, {figures['texts']} texts of "
        f"{figures['new_tokens']} tokens. Parameters: {parameters}; trained by ordinary training, the targets for "
        f"{figures['steps']} steps on the source text of Python's standard library.",
        "",
        *markdown_table(heads, cells),
        "",
        "N: tokens that the draft proposes per round. a: share of the examined tokens that stayed. c: seconds of a "
        "draft step, and v: of a check of N + 1 tokens, over those of a plain step of the target. Tokens per round by "
        "the formula: (1 - a^(N+1)) / (1 - a); speed, over plain decoding, by the formula: that over N c + v. Medians "
        f"of {figures['rounds']} rounds, in each of which every row has its turn. self:K: the first K layers of the "
        "target, which no training has prepared for it. What the last round of a text gives beyond its end is lost, "
        "which the formula does not count.",
        "",
        "Experts that a check touches, of those of an MoE layer; by the formula, E (1 - (1 - K/E)^(N+1)), if tokens "
        "chose theirs independently:",
        "",
        *markdown_table(["N", "experts", "formula"], touched),
        "",
        *claim_lines(claims),
        "",
    ]
    return "\n".join(lines)


def draw_chart(rows: Sequence[Row]) -> bytes:
    """A PNG: speed over the number of proposed tokens, measured and by the formula, for each target."""
    targets = list(dict.fromkeys(row.target for row in rows))
    figure, panels = new_figure(len(targets), 6 * len(targets), 4.8)
    for axes, target in zip(panels, targets, strict=True):
        _draw(axes, [row for row in rows if row.target == target], _WORDS[target])
    return png_of(figure)


def _draw(axes: "Axes", rows: Sequence[Row], title: str) -> None:
    kinds = list(dict.fromkeys((row.draft, row.temperature) for row in rows))
    for number, (draft, temperature) in enumerate(kinds):
        line = [row for row in rows if (row.draft, row.temperature) == (draft, temperature)]
        numbers, color = [row.draft_tokens for row in line], f"C{number}"
        name = f"{draft}, {'greedy' if temperature == 0 else f'temperature {temperature:g}'}"
        axes.plot(numbers, [row.speedup for row in line], "-o", color=color, label=name)
        axes.plot(numbers, [row.formula for row in line], ":", color=color)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="tokens proposed per round", ylabel="speed over plain decoding", title=f"{title} (dotted: formula)")
    axes.set_xticks(sorted({row.draft_tokens for row in rows}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
