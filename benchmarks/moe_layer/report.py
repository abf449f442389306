"""What the moe_layer benchmark prints: its setting, the check of the layers, and a table for each case."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.moe_layer.rows import CAPACITY_FACTOR, Case, RowResult
from benchmarks.runner.results import machine_words

TABLE_WIDTH = 120
# By the type of the device.
PEAK_MEMORY = {
    "cpu": "over the weights and the input, in one thread, as torch's allocator tells a profile; not what libraries "
    "keep, nor what moe_train's other threads hold of the one expert that each is at",
    "cuda": "over the weights and the input, from torch.cuda.max_memory_allocated",
}


def print_setting(console: Console, figures: dict[str, Any]) -> None:
    """Print where and how the figures are made.

    Args:
        console: Where to print.
        figures: machine, dtype, rounds, peak_memory and left_out, as in the JSON object.
    """
    console.print(f"{machine_words(figures['machine'])}; {figures['dtype']}")
    console.print(
        f"Forward and backward of one MoE layer, router included; medians of {figures['rounds']} rounds, in each of "
        "which every layer has its turn.\n"
        "dense_bound: a dense SwiGLU of the same FLOPs (T*K rows). zipf: the log of a Zipf law added to the logits.\n"
        f"Peak: most bytes at once during both passes, {figures['peak_memory']}."
    )
    if figures["left_out"]:
        console.print(f"Left out, for transformers cannot be imported: {', '.join(figures['left_out'])}.")


def print_check(console: Console, differences: dict[str, float], most: float) -> None:
    """Print whether every peer computes what moe_train does; `most` is the largest difference that is none."""
    console.print(
        "Output and all gradients beside moe_train's, same weights, fp32, largest difference as a share of the norm:"
    )
    for name, difference in differences.items():
        verdict = "same" if difference <= most else f"DIFFERS (more than {most:g})"
        console.print(f"  {name}: {difference:.1e}, {verdict}")


def case_table(case: Case, rows: Sequence[RowResult]) -> Table:
    """Table of the layers of one shape and routing."""
    table = Table(title=f"{case.shape.name}; {case.routing}", title_justify="left")
    table.add_column("layer")
    for head in ("ms", "of bound", "of moe_train", "peak, MiB"):
        table.add_column(head, justify="right")
    table.add_column("")
    for row in rows:
        note = f"drops {row.dropped:.1%} at capacity {CAPACITY_FACTOR:g}" if row.dropped else ""
        table.add_row(
            row.layer,
            f"{row.ms:.1f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in (row.ratio_to_bound, row.ratio_to_moe_train)),
            f"{row.peak_bytes / 2**20:,.1f}",
            note,
        )
    return table
