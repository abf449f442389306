"""What the mixers benchmark shows: a table in Markdown and a chart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.mixers.recall import LENGTH, PAIRS, SEGMENT, Recall
from benchmarks.mixers.rows import (
    ATTENTION,
    CONFIG,
    CONTROL,
    HELD_OUT_BYTES,
    INFINI_SEGMENT,
    MIXERS,
    TIMED,
    TRAINED,
    Difference,
    RunResult,
    Variant,
    difference,
    mean_curve,
)
from benchmarks.mixers.speed import Speed
from benchmarks.runner.processes import ROOT
from benchmarks.runner.results import claim_lines, machine_words, markdown_table, new_figure, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SEQUENCE = 128  # tokens of a training sequence in the quickstart


def markdown_report(
    results: Sequence[RunResult], recalls: Sequence[Recall], speeds: Sequence[Speed], figures: dict[str, Any]
) -> str:
    """How it was made, the tables, and what they show; a part that was not measured is left out.

    Args:
        results: Training runs.
        recalls: Accuracies of recall.
        speeds: Speeds and states.
        figures: machine, size, num_runs, claims.
    """
    lines = [f"{machine_words(figures['machine'])}, fp32, next to other work.", ""]
    lines += _quality(results, figures) if results else []
    lines += _recall(recalls) if recalls else []
    lines += _speed(speeds) if speeds else []
    return "\n".join([*lines, *claim_lines(figures["claims"]), ""])


def _quality(results: Sequence[RunResult], figures: dict[str, Any]) -> list[str]:
    size = figures["size"]
    tokens = size.steps * size.sequences * _SEQUENCE
    what = "bytes" if size.tokenizer == "bytes" else f"tokens of a {size.tokenizer.upper()}"
    seeds = sorted({result.seed for result in results})
    wanted = figures["num_runs"]
    some = f" {len(results)} of {wanted} runs have ended; differences need two seeds." if len(results) < wanted else ""
    rows = []
    for variant in TRAINED:
        own = [result for result in results if result.variant == variant.name]
        if own:
            to_attention = difference(results, variant, ATTENTION) if variant != ATTENTION else None
            to_control = difference(results, variant, CONTROL) if variant.is_hybrid and variant != CONTROL else None
            mean = sum(result.bits_per_byte for result in own) / len(own)
            rows.append([variant.name, f"{len(own)}", f"{mean:.4f}", _shown(to_attention), _shown(to_control)])
    return [
        *markdown_table(["mixers", "seeds", "bits per byte", "minus attention", "minus its zeroed self"], rows),
        "",
        f"Quality: the model of `{CONFIG.relative_to(ROOT)}` on the source text of Python's standard library, "
        f"{size.steps} steps of {size.sequences} sequences of {_SEQUENCE} {what} ({tokens:,} in all), "
        f"seeds {', '.join(map(str, seeds))}; segments of Infini-attention of {INFINI_SEGMENT} tokens. Bits per byte "
        f"of {HELD_OUT_BYTES:,} bytes of held-out text at the end. Differences are paired by seed, ± one standard "
        f"error. The zeroed self of every hybrid is `{CONTROL.name}`: three mixers computed, and multiplied by zero. "
        f"It tells how well a short run learns, not where a long one ends.{some}",
        "",
    ]


def _recall(recalls: Sequence[Recall]) -> list[str]:
    rows = [[recall.variant, f"{recall.accuracy:.1%}"] for recall in recalls]
    return [
        *markdown_table(["mixer", "recall"], rows),
        "",
        f"Recall: {PAIRS} pairs of a key and a value in the first {SEGMENT} of {LENGTH} tokens, the keys again in the "
        f"last {SEGMENT}: share of the values that are predicted. Who knows only which values there were is right in "
        f"{1 / PAIRS:.0%}. Mini-batches of TTT and segments of Infini-attention have {SEGMENT} tokens, so that recall "
        "goes over four of them; TTT has its short convolutions, without which it does not look one token back, from "
        f"a value to its key. Two layers of 64, {recalls[0].steps:,} steps of 32 sequences, one seed.",
        "",
    ]


def _speed(speeds: Sequence[Speed]) -> list[str]:
    contexts = sorted({speed.context for speed in speeds})
    of = {(speed.variant, speed.context): speed for speed in speeds}
    heads = [f"{what} at {context:,}" for what in ("train", "decode", "state, KiB") for context in contexts]
    rows = []
    for variant in TIMED:
        own = [of[variant.name, context] for context in contexts if (variant.name, context) in of]
        if own:
            training = [f"{speed.train_tokens_per_second:,.0f}" for speed in own]
            decoding = [f"{speed.decode_tokens_per_second:,.0f}" for speed in own]
            rows.append([variant.name, *training, *decoding, *(f"{speed.state_bytes / 1024:,.1f}" for speed in own)])
    return [
        *markdown_table(["mixers", *heads], rows),
        "",
        "Speed: tokens per second of CPU time of one thread. train: forward and backward pass over sequences of the "
        "context, 2,048 tokens or one sequence. decode: greedy, one sequence, up to the context; a step of a small "
        "model is mostly the time of starting its operations. state: decode state of one sequence. Mixers have their "
        f"usual settings. Medians of {len(speeds[0].decode_seconds)} rounds (training: "
        f"{len(speeds[0].train_seconds)}), in each of which everything has its turn.",
        "",
    ]


def _shown(found: Difference | None) -> str:
    return "-" if found is None else f"{found.mean:+.4f} ± {found.standard_error:.4f}"


def draw_chart(results: Sequence[RunResult], speeds: Sequence[Speed]) -> bytes:
    """A PNG: quality over tokens, time of a decoded token and bytes of the state over the context."""
    figure, (quality, decoding, states) = new_figure(3, 15, 5)
    for variant in TRAINED:
        color, style = _look(variant)
        tokens, values = mean_curve(results, variant)
        if tokens:
            quality.plot(tokens, values, style, color=color, marker="o", markersize=3, label=variant.name)
        own = sorted((speed for speed in speeds if speed.variant == variant.name), key=lambda speed: speed.context)
        if own:
            contexts = [speed.context for speed in own]
            milliseconds = [1000 / speed.decode_tokens_per_second for speed in own]
            decoding.plot(contexts, milliseconds, style, color=color, marker="o", markersize=3)
            states.plot(
                contexts, [speed.state_bytes / 1024 for speed in own], style, color=color, marker="o", markersize=3
            )
    if not results:
        quality.text(0.5, 0.5, "not trained", ha="center", transform=quality.transAxes)
    quality.set(xlabel="tokens trained on", ylabel="held-out bits per byte", title="quality, mean of the seeds")
    decoding.set(xlabel="context, tokens", ylabel="CPU ms per token", title="decoding, one sequence")
    states.set(xlabel="context, tokens", ylabel="KiB", title="decode state of one sequence", yscale="log")
    _mark_contexts((decoding, states), sorted({speed.context for speed in speeds}))
    decoding.set_ylim(bottom=0)
    for axes in (quality, decoding, states):
        axes.grid(alpha=0.3)
    figure.legend(*quality.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return png_of(figure)


def _look(variant: Variant) -> tuple[str, str]:
    """Color and line of a variant: one color per mixer, hybrids dashed."""
    if variant == CONTROL:
        return "gray", ":"
    name = variant.mixers[0]
    return ("black" if name == "attention" else f"C{MIXERS.index(name)}"), ("--" if variant.is_hybrid else "-")


def _mark_contexts(panels: Sequence["Axes"], contexts: Sequence[int]) -> None:
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
