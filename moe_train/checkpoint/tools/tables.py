"""Tables that `moe-train checkpoint` prints in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from moe_train.checkpoint.inventory import Entry
from moe_train.checkpoint.tools.difference import Difference, FieldDifference, TensorDifference
from moe_train.checkpoint.tools.inspection import Inspection, Statistics
from moe_train.checkpoint.verification import Verification

_MOST_ROWS = 30  # rows of tensors that differ


def plain(value: object) -> Text:
    """Show a value without markup and control characters: a hostile checkpoint may have them in a name."""
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)))


def as_bytes(number: float) -> str:
    """Format a number of bytes: "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def describe_layout(layout: Mapping[str, int]) -> str:
    """Describe the layout of a manifest: "4 ranks, EP 2, ZeRO 1"."""
    known = (("world_size", "{} ranks"), ("expert_parallel_size", "EP {}"), ("zero_stage", "ZeRO {}"))
    words = [text.format(layout[name]) for name, text in known if name in layout]
    if layout.get("context_parallel_size", 1) > 1:
        words.append(f"context {layout['context_parallel_size']}")
    return ", ".join(words) or "-"


def _table(title: str, left: Sequence[str], right: Sequence[str] = (), rows: Sequence[Sequence[object]] = ()) -> Table:
    """Make a table with left-aligned, wrapped columns, then right-aligned ones."""
    table = Table(title=plain(title), title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(plain(value) for value in row))
    return table


def entries_table(folder: str, entries: Sequence[Entry]) -> Table:
    """Make the table of `moe-train checkpoint list`."""
    rows = []
    for entry in entries:
        state = entry.kind if entry.kind != "checkpoint" else "manifest readable"
        if entry.problem is not None and entry.kind == "checkpoint":
            state = f"damaged: {entry.problem}"
        state = "" if state == "manifest readable" and entry.is_latest else state
        latest = "latest" if entry.is_latest else ""
        layout = describe_layout(entry.layout)
        written = entry.written[:16].replace("T", " ")  # to the minute; --json has all of it
        rows.append((entry.name, written, layout, f"{state} {latest}".strip(), as_bytes(entry.num_bytes)))
    return _table(folder, ("folder", "written", "layout", "state"), ("size",), rows)


def verification_table(found: Verification) -> Table:
    """Make the table of `moe-train checkpoint verify`."""
    rows = [(verdict.path.rpartition("/")[2], verdict.problem or "whole") for verdict in found.verdicts]
    return _table(found.folder, ("file", "verdict"), rows=rows)


def inspection_tables(found: Inspection) -> list[Table]:
    """Make the tables of `moe-train checkpoint inspect`."""
    facts = [
        ("step", f"{found.step:,}"),
        ("sequences", f"{found.consumed_sequences:,}"),
        ("updates of Adam", f"{found.optimizer_step:,}"),
        ("skipped steps", f"{found.skipped_steps:,}"),
        ("loss scale", f"{found.loss_scale:g}"),
        ("layout", describe_layout(found.layout)),
        ("tokenizer", found.tokenizer),
        ("format version", found.format_version),
        ("files", f"{found.files:,} with {as_bytes(found.num_bytes)} of tensors"),
        *((f"buffer {name}", f"{number} values") for name, number in found.buffers.items()),
    ]
    rows: list[tuple[object, ...]] = [
        (tensor.name, list(tensor.shape), f"{tensor.elements:,}", f"{100 * tensor.share:.2f} %")
        for tensor in found.tensors
    ]
    rows.append(("total", "", f"{found.parameters:,}", ""))
    return [
        _table(found.folder, ("", "value"), rows=facts),
        _table("parameters", ("tensor", "shape"), ("elements", "share"), rows),
    ]


def statistics_table(name: str, found: Sequence[Statistics]) -> Table:
    """Make the table of `moe-train checkpoint inspect --tensor`."""
    rows = [
        (one.kind, *(_number(value) for value in (one.min, one.max, one.mean, one.std, one.norm)), one.non_finite)
        for one in found
    ]
    return _table(name, ("",), ("min", "max", "mean", "std", "norm", "not finite"), rows)


def difference_tables(found: Difference) -> list[Table]:
    """Make the tables of `moe-train checkpoint diff`, with differences only."""
    tables = [
        _fields_table("manifest", found.fields),
        _fields_table("configuration", found.config),
        _fields_table("other shapes", found.other_shape),
        _table("only in A", ("name",), rows=[(name,) for name in found.only_in_a]),
        _table("only in B", ("name",), rows=[(name,) for name in found.only_in_b]),
        _tensors_table([tensor for tensor in found.tensors if tensor.differing]),
    ]
    return [table for table in tables if table.row_count]


def _fields_table(title: str, fields: Sequence[FieldDifference]) -> Table:
    return _table(title, ("field", "A", "B"), rows=[(one.name, one.a, one.b) for one in fields])


def _tensors_table(tensors: Sequence[TensorDifference]) -> Table:
    title = f"tensors that differ: {len(tensors)}"
    if len(tensors) > _MOST_ROWS:
        title += f", of which the worst {_MOST_ROWS}"
    rows = [
        (one.name, one.kind, _number(one.relative_l2), _number(one.max_difference), f"{one.differing:,}")
        for one in tensors[:_MOST_ROWS]
    ]
    return _table(title, ("tensor", "kind"), ("relative L2", "largest", "elements"), rows)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}"
