"""What the hidden_decoding benchmark shows: tables in Markdown and a chart."""

from collections.abc import Sequence
from typing import Any

from benchmarks.hidden_decoding.measure import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS
from benchmarks.hidden_decoding.rows import PAPER_LOSSES, PLAIN, Copies, Timing, Trained, paired_difference
from benchmarks.runner.results import claim_lines, machine_words, markdown_table, new_figure, png_of


def markdown_report(
    rows: Sequence[Copies],
    timings: dict[str, dict[Copies, Timing]],
    cache_bytes: dict[Copies, int],
    trained: dict[Copies, Trained],
    claims: Sequence[dict[str, Any]],
    figures: dict[str, Any],
) -> str:
    """How it was made, the tables, and what they show."""
    heads = [
        "",
        "attention, ms",
        "x plain",
        "prefill, ms",
        "x plain",
        "decoding, ms per token",
        "x plain",
        "cache, MiB",
    ]
    cells = []
    for row in rows:
        times = [timings[name][row] for name in ("attention", "prefill", "decode")]
        shown = [text for each in times for text in (f"{1e3 * each.seconds:,.1f}", f"{each.ratio:.2f}")]
        cells.append([row.name, *shown, f"{cache_bytes[row] / 2**20:.3f}"])
    lines = [
        f"{machine_words(figures['machine'])}, fp32. PHD n: n copies of a token; PHD-SWA n-W: a window of W positions; "
        "PHD-CSWA n-W-C: in chunks of C positions.",
        "",
        *markdown_table(heads, cells),
        "",
        f"Attention: forward and backward, {figures['attention_length']:,} tokens, {NUM_HEADS} heads of {HEAD_DIM}, "
        f"{NUM_KV_HEADS} key heads. Prefill and decoding: one sequence, {figures['length']:,} tokens, a dense model of "
        f"width {figures['hidden_size']} with {figures['num_layers']} layers. Times are the least of "
        f"{figures['rounds']} rounds, ratios the medians of the rounds, in each of which every row has its turn.",
        "",
    ]
    if trained:
        lines += [*_losses(rows, trained), "", _about_training(figures), ""]
    else:
        lines += ["Not trained (--skip-training): no losses.", ""]
    return "\n".join([*lines, *claim_lines(claims), ""])


def _losses(rows: Sequence[Copies], trained: dict[Copies, Trained]) -> list[str]:
    heads = ["", "FLOPs per token", "x plain", "loss", "from plain", "standard error", "loss at plain's last FLOPs"]
    cells = []
    plain = trained[PLAIN]
    for row in rows:
        own = trained[row]
        mean, error = paired_difference(own, plain)
        ratio = own.flops_per_token / plain.flops_per_token
        loss = sum(own.losses) / len(own.losses)
        equal = _loss_at(own, own.curve[-1][0] / ratio)
        shown = ["-", "-"] if row == PLAIN else [f"{mean:+.4f}", f"{error:.4f}"]
        cells.append(
            [row.name, f"{own.flops_per_token / 1e6:.1f} M", f"{ratio:.2f}", f"{loss:.4f}", *shown, f"{equal:.4f}"]
        )
    return markdown_table(heads, cells)


def _loss_at(own: Trained, tokens: float) -> float:
    """Interpolate the loss of a run at a number of tokens."""
    before = own.curve[0]
    for point in own.curve:
        if point[0] >= tokens:
            width = point[0] - before[0]
            share = (tokens - before[0]) / width if width else 1.0
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]


def _about_training(figures: dict[str, Any]) -> str:
    paper = ", ".join(f"n = {copies}: {loss}" for copies, loss in PAPER_LOSSES.items())
    return (
        f"Loss: held-out, nats per token, after {figures['steps']} steps; mean of {figures['seeds']} seeds, "
        "differences paired by seed. At plain's last FLOPs: the row's loss when it has used as many operations as "
        "plain at its end; its learning rate is still higher then. The paper, 1.2 billion dense parameters after 500 "
        "billion tokens "
        f"(CSWA): {paper}."
    )


def draw_chart(
    rows: Sequence[Copies], timings: dict[str, dict[Copies, Timing]], trained: dict[Copies, Trained]
) -> bytes:
    """A PNG: times over plain, and loss against tokens and against operations."""
    figure, (left, middle, right) = new_figure(3, 15, 4.8)
    names = [row.name for row in rows]
    for number, (name, found) in enumerate(timings.items()):
        places = [place + (number - 1) * 0.27 for place in range(len(rows))]
        left.bar(places, [found[row].ratio for row in rows], 0.25, label=name)
    left.set_xticks(range(len(rows)), names, rotation=30, ha="right", fontsize=8)
    left.set(ylabel="times the plain model", title="time")
    left.axhline(1.0, color="black", linewidth=0.6)
    left.legend(fontsize=8, frameon=False)
    for row in rows if trained else ():
        own = trained[row]
        tokens, losses = zip(*own.curve, strict=True)
        middle.plot(tokens, losses, marker="o", markersize=3, label=row.name)
        right.plot([count * own.flops_per_token for count in tokens], losses, marker="o", markersize=3, label=row.name)
    for axes, what in ((middle, "tokens"), (right, "floating-point operations")):
        axes.set(xlabel=what, ylabel="held-out loss, nats per token", title=f"loss against {what}")
        axes.grid(alpha=0.3)
        if trained:
            axes.legend(fontsize=8, frameon=False)
        else:
            axes.text(0.5, 0.5, "not trained", ha="center", transform=axes.transAxes)
    return png_of(figure)
