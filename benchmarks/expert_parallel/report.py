"""What the expert_parallel benchmark prints: a table of bytes and times, how it was made, and what it shows."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.expert_parallel.rows import PARTS, RowResult, Shape
from benchmarks.runner.results import claim_lines, machine_words

_TABLE_WIDTH = 200  # narrower, its heads would be cut off
_TEXT_HEADS = ("dispatch", "payload")
_HEADS = ("dispatch", "chunks", "payload", "ranks", "rows MB", "formula", "uniform", "across", "metadata", "step ms")
_HEADS += ("of flat", *PARTS, "exchange", "differs")


def show(rows: Sequence[RowResult], claims: Sequence[dict[str, Any]], shape: Shape, machine: dict[str, Any]) -> None:
    """Print the table, how it was made, and what it shows.

    Args:
        rows: Rows by number of ranks, rising.
        claims: Claims, each with whether it holds.
        shape: Sizes of the layer.
        machine: Where it was measured.
    """
    title = "MB sent to other ranks in a forward pass, all ranks; ms of a training step"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for head in _HEADS:
        table.add_column(head, justify="left" if head in _TEXT_HEADS else "right")
    for before, row in zip([None, *rows], rows):
        if before is not None and before.ranks != row.ranks:
            table.add_section()
        times = (f"{getattr(row, f'{part}_ms'):.1f}" for part in PARTS)
        sizes = (row.bytes, row.formula_bytes, row.expected_bytes, row.across_bytes, row.metadata_bytes)
        table.add_row(
            *(row.dispatch, str(row.chunks), row.payload, str(row.ranks)),
            *(f"{size / 1e6:.2f}" for size in sizes),
            *(f"{row.step_ms:.0f}", f"{1 / row.speed_over_flat:.2f}", *times, f"{row.exchange_ms:.1f}"),
            "0" if row.difference == 0 else f"{row.difference:.0e}",
        )
    Console(width=_TABLE_WIDTH, highlight=False).print(table)
    print("\n".join([_how_made(max(row.ranks for row in rows), shape, machine), *claim_lines(claims)]))


def _how_made(most_ranks: int, shape: Shape, machine: dict[str, Any]) -> str:
    cores = machine["cores"]
    crowded = f"; {most_ranks} ranks share {cores} cores, so that a rank waits for others' work too"
    nodes = f"{shape.nodes} nodes, " + (f"{shape.link_mbit:g} Mbit/s between them" if shape.link_mbit else "no network")
    return (
        f"{shape.tokens} tokens per rank, D {shape.hidden}, F {shape.inner}, E {shape.experts}, K {shape.top_k}, fp32, "
        f"gloo, {nodes}; {machine_words(machine)}, one thread per rank{crowded if most_ranks > cores else ''}.\n"
        f"Medians of {shape.rounds} rounds, in each the slowest rank of every part (the parts add up to more than the "
        "step). formula: for the routing drawn; uniform: expected for uniform routing; across: rows between nodes; "
        "metadata: counts, gates, places; exchange: starting all-to-alls of both passes and waiting for them; differs: "
        "outputs and gradients from flat's in one chunk, relative."
    )
