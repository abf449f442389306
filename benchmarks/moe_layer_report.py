"""What benchmarks/moe_layer.py prints."""

from collections.abc import Sequence
from typing import Any

from moe_layer_rows import CAPACITY_FACTOR, Case, RowResult
from rich.console import Console
from rich.table import Table


def print_setting(console: Console, figures: dict[str, Any]) -> None:
    """Where and how the figures are made."""
    machine = figures["machine"]
    versions = ", ".join(f"{name} {machine[name] or 'not there'}" for name in ("torch", "deepspeed", "transformers"))
    console.print(f"{machine['processor']}, {machine['threads']} threads; {versions}; {figures['dtype']}")
    console.print(
        f"Forward and backward of one MoE layer, router included; medians of {figures['rounds']} rounds, in each of "
        "which every layer has its turn.\n"
        "dense_bound: a dense SwiGLU of the same FLOPs (T*K rows). zipf: the log of a Zipf law added to the logits.\n"
        f"Peak: most bytes at once during both passes, {figures['peak_memory']}."
    )
    if figures["left_out"]:
        console.print(f"Left out, for transformers cannot be imported: {', '.join(figures['left_out'])}.")


def print_check(console: Console, differences: dict[str, float], most: float) -> None:
    """Whether every peer computes what moe_train does."""
    console.print(
        "Output and all gradients beside moe_train's, same weights, fp32, largest difference as a share of the norm:"
    )
    for name, difference in differences.items():
        verdict = "same" if difference <= most else f"DIFFERS (more than {most:g})"
        console.print(f"  {name}: {difference:.1e}, {verdict}")


def case_table(case: Case, rows: Sequence[RowResult]) -> Table:
    """The layers of one shape and routing."""
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


def print_claims(console: Console, claims: Sequence[dict[str, Any]]) -> None:
    """Each with whether it holds."""
    for claim in claims:
        console.print(f"- {'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}")
