"""What the train benchmark prints: a table of speeds, how it was made, and what it shows."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.runner.results import claim_lines, machine_words
from benchmarks.train.rows import OURS, STEPS_PER_RECORD, WARM_UP_STEPS, RowResult, Setting

_TABLE_WIDTH = 170


def show(
    figures: dict[str, Any], setting: Setting, rows: Sequence[RowResult], claims: Sequence[dict[str, Any]]
) -> None:
    """Print the table, how it was made, and what it shows.

    Args:
        figures: machine, rounds, left_out and peers_keep_freed_memory, as in the JSON object.
        setting: Sizes.
        rows: Rows of the systems.
        claims: Claims, each with whether it holds.
    """
    console = Console(width=_TABLE_WIDTH, highlight=False, soft_wrap=True)
    table = Table(title="Training, all ranks together", box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("system")
    for head in ("tokens/s", "quartiles", f"{OURS} / it", "quartiles", "parameters", "cross-entropy"):
        table.add_column(head, justify="right")
    table.add_column("", overflow="fold")
    for row in rows:
        table.add_row(
            row.system,
            f"{row.tokens_per_second:,.0f}",
            " to ".join(f"{value:,.0f}" for value in row.quartiles),
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            "-" if row.ratio_quartiles is None else " to ".join(f"{value:.2f}" for value in row.ratio_quartiles),
            f"{row.parameters:,}",
            f"{row.cross_entropy:.3f}",
            row.detail,
        )
    console.print(table)
    console.print(_how_made(figures, setting))
    for name, reason in figures["left_out"].items():
        console.print(f"Left out: {name}, for {reason}", markup=False)
    for line in claim_lines(claims):
        console.print(line)


def _how_made(figures: dict[str, Any], setting: Setting) -> str:
    machine = figures["machine"]
    most, cores = setting.ranks * setting.threads, machine["cores"]
    crowded = f" ({most} threads share {cores} cores)" if most > cores else ""
    memory = "keep freed memory as the trainer does" if figures["peers_keep_freed_memory"] else "are left as they are"
    return (
        f"{machine_words(machine)}; {setting.ranks} ranks of {setting.threads} "
        f"thread{'s' if setting.threads > 1 else ''}{crowded}, gloo, {setting.dtype}.\n"
        f"hidden {setting.hidden}, {setting.layers} layers, {setting.heads} heads ({setting.kv_heads} of keys and "
        f"values), {setting.experts} experts of {setting.inner}, {setting.top_k} per token, vocabulary "
        f"{setting.vocabulary:,}; micro-batch {setting.micro_batch} x {setting.sequence} tokens; ZeRO-1, fused AdamW, "
        "clipping 1.0, router loss 0.001.\n"
        f"Medians and quartiles of {figures['rounds']} rounds, in each of which every system trains "
        f"{WARM_UP_STEPS} steps untimed and {setting.steps} timed as a fresh group of ranks on the same tokens of the "
        f"standard library's source. {OURS}: launch/train.py, a record every {STEPS_PER_RECORD} steps; the peers: a "
        f"bare loop, whose C libraries {memory}. Cross-entropy: of the last step, nats per token."
    )
