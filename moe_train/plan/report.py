"""Printed form of a plan: a bar of memory by part, the traffic, the terms of a step, and a verdict."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.model.block import NO_RECOMPUTE
from moe_train.plan.amounts import show_bytes, show_seconds
from moe_train.plan.layout import Layout
from moe_train.plan.planner import Plan
from moe_train.plan.search import Candidate
from moe_train.plan.whole_run import WholeRun

_COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red", "bright_blue", "bright_magenta", "bright_black")
_GIB, _WIDTH, _LEAST_SHARE = 2**30, 40, 1e-3


def show_plan(plan: Plan, console: Console, run: WholeRun | None = None) -> None:
    """Print a plan to a console, and a run to a number of tokens if there is one."""
    count, layout = plan.shape.parameters, plan.layout
    ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
    console.print(f"parameters  {count.total:,} total, {count.active:,} active per token")
    context = f", context parallel {layout.context_size}" if layout.context_size > 1 else ""
    console.print(
        f"layout      {ranks}, expert parallel {layout.ep_size}{context}, ZeRO {layout.zero_stage}, "
        f"micro-batch {layout.micro_batch} x {layout.accumulation}, dispatch {layout.dispatch} in {layout.chunks}, "
        f"{', '.join((layout.precision, *_savings(layout)))}",
        soft_wrap=True,
    )
    console.print()
    _show_memory(plan, console)
    console.print()
    console.print(_traffic_table(plan))
    console.print(_terms_table(plan))
    step = plan.step
    console.print(
        f"step        {show_seconds(step.seconds)} in the mean, {show_seconds(step.p50)} p50, "
        f"{show_seconds(step.p99)} p99; largest term: {step.largest_term.replace('_', ' ')}",
        soft_wrap=True,
    )
    console.print(f"speed       {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}")
    if run is not None:
        _show_run(run, console)
    for warning in warnings_of(plan):
        console.print(Text(f"warning     {warning}", style="yellow"), soft_wrap=True)
    console.print(Text(verdict(plan), style="green" if plan.fits else "red"), soft_wrap=True)


def warnings_of(plan: Plan) -> list[str]:
    """List what a plan cannot know, and the settings that make no difference to it."""
    return [*plan.warnings, *(f"{name} is not planned: figures are those without it" for name in plan.not_planned)]


def _show_run(run: WholeRun, console: Console) -> None:
    kept, saved = (
        "1 is kept" if run.checkpoints.num_kept == 1 else f"{run.checkpoints.num_kept:,} are kept",
        run.checkpoints,
    )
    console.print(
        f"run         {run.tokens:,} tokens in {run.steps:,} steps: {run.hours:,.1f} hours, {run.gpu_hours:,.1f} "
        "GPU-hours; validation, restarts and saves that training waits for are not in it",
        soft_wrap=True,
    )
    console.print(
        f"checkpoints {show_bytes(saved.num_bytes)} each; {kept}, {show_bytes(saved.kept_bytes)}; at most "
        f"{show_bytes(saved.most_bytes)} while one is written",
        soft_wrap=True,
    )


def verdict(plan: Plan) -> str:
    """Say whether a plan fits; if not, by how much it is over, and which part is largest."""
    held, room = plan.memory.total / _GIB, plan.capacity / _GIB
    if plan.fits:
        return f"fits: {held:.1f} of {room:.1f} GiB a rank"
    host_room = plan.question.host_capacity
    if held <= room and host_room is not None:
        return (
            f"does not fit: over by {(plan.memory.host_total - host_room) / _GIB:.1f} GiB a rank in the memory of the "
            f"host ({plan.memory.host_total / _GIB:.1f} of {host_room / _GIB:.1f} GiB)"
        )
    part = max(plan.memory.parts, key=lambda name: plan.memory.parts[name])
    return (
        f"does not fit: over by {held - room:.1f} GiB ({held:.1f} of {room:.1f} GiB a rank), largest part "
        f"{part.replace('_', ' ')} with {plan.memory.parts[part] / _GIB:.1f} GiB"
    )


def show_candidates(best: Sequence[Candidate], tried: int, console: Console) -> None:
    """Print the fastest layouts that fit.

    Args:
        best: Layouts to print, the fastest first.
        tried: Number of layouts that were planned.
        console: Console to print to.
    """
    shares = any(candidate.layout.context_size > 1 for candidate in best)  # else that column says nothing
    title = f"the fastest of {tried:,} layouts"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for candidate in best:
        layout, step = candidate.layout, candidate.step
        row = {
            "EP": str(layout.ep_size),
            **({"CP": str(layout.context_size)} if shares else {}),
            "ZeRO": str(layout.zero_stage),
            "batch": f"{layout.micro_batch} x {layout.accumulation}",
            "saves by": ", ".join(_savings(layout)) or "-",
            "dispatch": f"{layout.dispatch} x {layout.chunks}",
            "GiB": f"{candidate.memory.total / _GIB:.1f}",
            "step": show_seconds(step.seconds),
            "p99": show_seconds(step.p99),
            "largest term": step.largest_term.replace("_", " "),
        }
        if not table.columns:
            for name in row:
                table.add_column(name)
        table.add_row(*row.values())
    console.print(table)


def _savings(layout: Layout) -> list[str]:
    """List how a layout saves memory of its devices."""
    found = [] if layout.recompute == NO_RECOMPUTE else [f"recompute {layout.recompute}"]
    return [*found, "offload"] if layout.offloads else found


def _show_memory(plan: Plan, console: Console) -> None:
    parts, total = plan.memory.parts, plan.memory.total
    scale = max(total, plan.capacity)
    bar, done, cells = Text("memory      "), 0.0, 0
    for colour, held in zip(_COLOURS, parts.values(), strict=True):
        done += held
        end = round(done / scale * _WIDTH)
        bar.append("█" * (end - cells), colour)
        cells = end
    bar.append("·" * (_WIDTH - cells))
    bar.append(f"  {total / _GIB:.2f} of {plan.capacity / _GIB:.2f} GiB")
    console.print(bar)
    for colour, (name, held) in zip(_COLOURS, parts.items(), strict=True):
        if held > _LEAST_SHARE * total:
            line = Text("            ")
            line.append("█ ", colour)
            line.append(f"{name.replace('_', ' '):<18}{held / _GIB:>9.2f} GiB {held / total:>6.1%}")
            console.print(line)
    console.print(f"            at its most in: {plan.memory.moment}")
    room = plan.question.host_capacity
    if room is not None:
        ranks, held = plan.question.cluster.gpus_per_node, plan.memory.host_total
        console.print(
            f"host        {held * ranks / _GIB:,.1f} of {room * ranks / _GIB:,.1f} GiB a node", soft_wrap=True
        )


def _traffic_table(plan: Plan) -> Table:
    table = Table("bytes that a rank sends in a step", "inside of the node", "across nodes", title_justify="left")
    rows = {name.replace("_", " "): sent for name, sent in plan.traffic.parts.items()} | {"all": plan.traffic.total}
    for name, sent in rows.items():
        table.add_row(name, show_bytes(sent.intra_node), show_bytes(sent.inter_node))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _terms_table(plan: Plan) -> Table:
    table = Table("seconds of a step", "", "share")
    for name, seconds in sorted(plan.step.terms.items(), key=lambda item: -item[1]):
        if seconds > _LEAST_SHARE * plan.step.seconds:
            table.add_row(name.replace("_", " "), show_seconds(seconds), f"{seconds / plan.step.seconds:.1%}")
    if plan.step.hidden:
        table.add_row("all to all, hidden", show_seconds(plan.step.hidden), "")
    for column in table.columns[1:]:
        column.justify = "right"
    return table
