"""Two plans side by side: settings that differ, memory by part, bytes by link, time of a step, tokens per second."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.config.base import field_values
from moe_train.plan.amounts import show_bytes, show_seconds
from moe_train.plan.planner import Plan
from moe_train.plan.report import verdict, warnings_of
from moe_train.plan.whole_run import WholeRun

_GIB = 2**30
_LEAST_SHARE = 1e-3  # of memory or time, for a row of its own
_COMPARED = (
    "memory",
    "host_memory",
    "memory_total",
    "traffic",
    "traffic_by_part",
    "step",
    "mfu",
    "run",
)  # of a plan's JSON


@dataclass(frozen=True)
class Side:
    """One of the plans that are compared.

    Attributes:
        plan: The plan.
        run: A run to a number of tokens by this plan; None: not asked.
    """

    plan: Plan
    run: WholeRun | None

    def as_dict(self) -> dict[str, Any]:
        """Return plan and run as plain values for JSON."""
        return self.plan.as_dict() | ({} if self.run is None else {"run": self.run.as_dict()})


def compare(first: Side, second: Side) -> dict[str, Any]:
    """Return two plans, the settings that differ, and the ratios second / first as plain values for JSON.

    A ratio is None where the first number is 0.
    """
    one, other = first.as_dict(), second.as_dict()
    ratio = {name: _ratios(one[name], other[name]) for name in _COMPARED if name in one}
    return {"first": one, "second": other, "changes": changed_settings(first.plan, second.plan), "ratio": ratio}


def changed_settings(first: Plan, second: Plan) -> dict[str, list[Any]]:
    """List the fields of the resolved configurations that differ, each with both values."""
    one, other = (dict(field_values(plan.config.model_dump(mode="json"))) for plan in (first, second))
    names = [name for name in dict.fromkeys([*one, *other]) if name != "train.run_dir"]
    return {name: [one.get(name), other.get(name)] for name in names if one.get(name) != other.get(name)}


def show_comparison(first: Side, second: Side, console: Console) -> None:
    """Print two plans side by side."""
    changes = changed_settings(first.plan, second.plan)
    for name, (one, other) in changes.items():
        console.print(Text(f"changed     {name}: {one} -> {other}"), soft_wrap=True)
    if not changes:
        console.print("changed     nothing")
    table = Table("", "first", "second", "ratio", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for rows in (_memory_rows, _traffic_rows, _time_rows, _run_rows):
        for name, one, other, show in rows(first, second):
            table.add_row(name, show(one), show(other), f"{other / one:.2f}" if one else "-")
        table.add_section()
    console.print(table)
    for name, side in (("first", first), ("second", second)):
        text = Text(f"{name:<12}{verdict(side.plan)}", style="green" if side.plan.fits else "red")
        console.print(text, soft_wrap=True)
        for warning in warnings_of(side.plan):
            console.print(Text(f"warning     {name}: {warning}", style="yellow"), soft_wrap=True)


_Row = tuple[str, float, float, Any]  # name, both values, and how a value is shown


def _memory_rows(first: Side, second: Side) -> Iterator[_Row]:
    memories = first.plan.memory, second.plan.memory
    for name, one in memories[0].parts.items():
        other = memories[1].parts[name]
        if one > _LEAST_SHARE * memories[0].total or other > _LEAST_SHARE * memories[1].total:
            yield name.replace("_", " "), one, other, _gib
    yield "memory of a rank", memories[0].total, memories[1].total, _gib


def _traffic_rows(first: Side, second: Side) -> Iterator[_Row]:
    one, other = first.plan.traffic.total, second.plan.traffic.total
    yield "sent inside of the node, per step", one.intra_node, other.intra_node, show_bytes
    yield "sent across nodes, per step", one.inter_node, other.inter_node, show_bytes


def _time_rows(first: Side, second: Side) -> Iterator[_Row]:
    steps = first.plan.step, second.plan.step
    for name, one in steps[0].terms.items():
        other = steps[1].terms[name]
        if one > _LEAST_SHARE * steps[0].seconds or other > _LEAST_SHARE * steps[1].seconds:
            yield name.replace("_", " "), one, other, show_seconds
    yield "time of a step", steps[0].seconds, steps[1].seconds, show_seconds
    yield "tokens per second", first.plan.tokens_per_second, second.plan.tokens_per_second, "{:,.0f}".format
    yield "MFU", first.plan.mfu, second.plan.mfu, "{:.1%}".format


def _run_rows(first: Side, second: Side) -> Iterator[_Row]:
    one, other = first.run, second.run
    if one is None or other is None:
        return
    yield f"steps to {one.tokens:,} tokens", one.steps, other.steps, "{:,}".format
    yield "hours", one.hours, other.hours, "{:,.1f}".format
    yield "GPU-hours", one.gpu_hours, other.gpu_hours, "{:,.1f}".format
    yield "a checkpoint", one.checkpoints.num_bytes, other.checkpoints.num_bytes, show_bytes
    yield "checkpoints kept", one.checkpoints.kept_bytes, other.checkpoints.kept_bytes, show_bytes


def _gib(number: float) -> str:
    return f"{number / _GIB:,.2f} GiB"


def _ratios(first: Any, second: Any) -> Any:
    """Divide the numbers of two values of the same form; what is no number is left out."""
    if isinstance(first, dict):
        return {name: _ratios(each, second[name]) for name, each in first.items() if not isinstance(each, str)}
    return second / first if first else None
