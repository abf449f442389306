"""What the kv_cache benchmark shows: a table in Markdown and a chart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.kv_cache.rows import CONFIG, Recomputed, RowResult
from benchmarks.runner.processes import ROOT
from benchmarks.runner.results import claim_lines, machine_words, markdown_table, new_figure, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))  # of a number of owner layers


def markdown_report(
    rows: Sequence[RowResult], recomputed: Recomputed, claims: Sequence[dict[str, Any]], figures: dict[str, Any]
) -> str:
    """How it was made, the table, and what it shows."""
    lengths, batch_size = figures["lengths"], figures["batch_size"]
    longest = lengths[-1]
    heads = [
        *("", "M", "G", "parameters", "cache, MiB", "of MHA", f"batch in {figures['memory_gib']:g} GiB"),
        *(f"tokens/s at {length:,}" for length in lengths),
        "loss",
    ]
    mha = next(row for row in rows if row.name == "MHA")
    cells = [
        [
            *(row.name, f"{row.kv_layers}", f"{row.num_kv_heads}", f"{row.parameters / 1e6:.1f} M"),
            *(f"{row.cache_bytes / 2**20:,.1f}", f"{row.cache_bytes / mha.cache_bytes:.1%}", f"{row.largest_batch:,}"),
            *(f"{speed:.0f}" for speed in row.decode_tokens_per_second_by_length.values()),
            "-" if row.loss is None else f"{row.loss:.3f}",
        ]
        for row in rows
    ]
    same = "the same tokens" if recomputed.same_tokens else "not the same tokens: rounding decided between near equals"
    lines = [
        f"{machine_words(figures['machine'])}, fp32; {batch_size} sequences.",
        "",
        *markdown_table(heads, cells),
        "",
        f"M: layers that own keys and values; G: key/value heads of each. Cache: of {batch_size} sequences of "
        f"{longest:,} tokens, as the cache object reports it. Batch: sequences of {longest:,} tokens whose cache fits "
        "beside the weights. tokens/s: greedy, of all sequences together, up to that length; medians of "
        f"{figures['rounds']} rounds, in each of which every row has its turn. {_about_loss(figures)}",
        "",
        f"One sequence of {recomputed.length:,} tokens, MHA: {recomputed.cached_tokens_per_second:.1f} tokens/s with "
        f"the cache, {recomputed.recomputed_tokens_per_second:.2f} recomputing the prefix; {same}.",
        "",
        *claim_lines(claims),
        "",
    ]
    return "\n".join(lines)


def draw_chart(rows: Sequence[RowResult], figures: dict[str, Any]) -> bytes:
    """A PNG: speed of decoding over the length, and the loss over the cache's size."""
    figure, (left, right) = new_figure(2, 12, 5.4)
    heads = sorted({row.num_kv_heads for row in rows}, reverse=True)
    colors = {num_heads: f"C{number}" for number, num_heads in enumerate(heads)}
    styles = dict(zip(sorted({row.kv_layers for row in rows}, reverse=True), _STYLES * len(rows)))
    _draw_speeds(left, rows, colors, styles, figures)
    _draw_losses(right, rows, colors, styles)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(
        *left.get_legend_handles_labels(),
        title="(layers that own keys and values, heads of each)",
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )
    return png_of(figure)


def _draw_speeds(axes: "Axes", rows: Sequence[RowResult], colors: dict, styles: dict, figures: dict[str, Any]) -> None:
    by_heads = sorted(rows, key=lambda row: (-row.num_kv_heads, -row.kv_layers))
    for row in by_heads:
        line, marker = styles[row.kv_layers]
        speeds = row.decode_tokens_per_second_by_length
        axes.plot(
            list(speeds), list(speeds.values()), line, marker=marker, color=colors[row.num_kv_heads], linewidth=1.6,
            markersize=5, label=f"{row.name} {row.pair}",
        )  # fmt: skip
    lengths = figures["lengths"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="length, tokens", ylabel="tokens/s", title=f"decoding, {figures['batch_size']} sequences")


def _draw_losses(axes: "Axes", rows: Sequence[RowResult], colors: dict, styles: dict) -> None:
    axes.set(xscale="log", xlabel="cache, bytes per token (fp32, heads of 64)", ylabel="held-out loss, nats per token")
    axes.set_title("loss after the same training tokens")
    trained = [row for row in rows if row.loss is not None]
    if not trained:
        axes.text(0.5, 0.5, "not trained", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    taken: dict[int, list[float]] = {}  # losses of the labels at a size, to the right of their points
    losses = [row.loss for row in trained if row.loss is not None]
    close = (max(losses) - min(losses)) * 0.045
    for row in trained:
        assert row.loss is not None
        marker = styles[row.kv_layers][1]
        axes.scatter(row.cache_bytes_per_token, row.loss, color=colors[row.num_kv_heads], marker=marker, s=60, zorder=3)
        is_right = all(abs(row.loss - other) > close for other in taken.get(row.cache_bytes_per_token, []))
        if is_right:
            taken.setdefault(row.cache_bytes_per_token, []).append(row.loss)
        axes.annotate(
            row.pair, (row.cache_bytes_per_token, row.loss), xytext=(8 if is_right else -8, 0),
            textcoords="offset points", ha="left" if is_right else "right", va="center", fontsize=8,
        )  # fmt: skip
    sizes = sorted({row.cache_bytes_per_token for row in trained})
    axes.set_xticks(sizes, [_short(size) for size in sizes], fontsize=8)
    axes.set_xlim(sizes[0] / 1.8, sizes[-1] * 1.8)
    axes.minorticks_off()


def _about_loss(figures: dict[str, Any]) -> str:
    if figures["steps"] is None:
        return "No loss: without training."
    return (
        "Loss: held-out cross-entropy, nats per token, with the same layers and heads in a smaller model "
        f"(`{CONFIG.relative_to(ROOT)}`) after {figures['steps']} steps on the source text of Python's standard "
        "library, one seed; it tells how well a short run learns, not what sharing costs in a long one (Zuhri et al. "
        "2024: little down to half of the layers, much at one)."
    )


def _short(size: int) -> str:
    return f"{size / 1024:g} KiB" if size >= 1024 else f"{size} B"
