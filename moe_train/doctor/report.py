"""Report of the doctor as tables for a terminal. `--json` prints the same object."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_MOST_LINKS = 4  # rows for each kind of link, the slowest first


def show_report(report: dict[str, Any], console: Console) -> None:
    """Print the report as tables, then its warnings and problems.

    Args:
        report: Report that `Examination` passes to its `show`.
        console: Console to print to.
    """
    world = report["world"]
    line = f"{_count(world['world_size'], 'rank')} on {_count(world['num_nodes'], 'host')} ({world['launcher']})"
    console.print(f"moe-train doctor: {line}; {report['seconds']:.0f} s", highlight=False)
    if report["ranks"]:
        console.print(_host_table(report["ranks"]))
    if report["folder"]:
        folder = report["folder"]
        free = folder["free_bytes"] / 2**30
        console.print(f"shared folder {folder['path']}: {free:.0f} GiB free", highlight=False, soft_wrap=True)
    if report["collectives"]:
        console.print(_collectives_table(report["collectives"]))
    if report["links"]:
        console.print(_links_table(report["links"]))
    if report["machine"]:
        console.print(_machine_table(report["machine"]))
    for text in report["not_measured"]:
        console.print(f"not measured: {text}", highlight=False, soft_wrap=True)
    for title, findings in (("warning", report["warnings"]), ("PROBLEM", report["problems"])):
        for found in findings:
            text = f"{title} [{found['kind']}] {found['where']}: {_without(found['where'], found['message'])}"
            console.print(f"{text} -> {found['remedy']}", markup=False, highlight=False, soft_wrap=True)
    console.print("all is well" if report["passed"] else _count(len(report["problems"]), "problem"), highlight=False)


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _without(where: str, message: str) -> str:
    return message.removeprefix(f"{where}: ")


def _host_table(ranks: Sequence[dict[str, Any]]) -> Table:
    """Make a table with one row for all hosts that are alike."""
    hosts: dict[str, list[dict[str, Any]]] = {}
    for rank in ranks:
        hosts.setdefault(rank["host"], []).append(rank)
    rows: dict[tuple[str, ...], list[str]] = {}
    for host, members in hosts.items():
        first = members[0]
        kind = first["device"]["kind"]
        device = first["device"]["name"] + (f", {_size(first['device']['memory'])}" if kind == "cuda" else "")
        versions = f"torch {first['versions']['torch']}, code {first['digest'][:8]}"
        memory = _size(first["memory"])
        cores = f"{first['cores']} cores, {first['threads']} a rank"
        nic = f"{first['interface'] or '-'}" + (f" {first['interface_mbit']} Mbit/s" if first["interface_mbit"] else "")
        row: tuple[str, ...] = (str(len(members)), device, memory, cores, nic, versions)
        rows.setdefault(row, []).append(host)
    table = Table(title="Hosts")
    for column in ("host", "ranks", "device", "memory", "CPU", "interface", "software"):
        table.add_column(column)
    for cells, names in rows.items():
        name = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)} alike)"
        table.add_row(name, *cells)
    return table


def _collectives_table(collectives: Sequence[dict[str, Any]]) -> Table:
    scopes = list(dict.fromkeys(each["scope"] for each in collectives))
    words = {"within": "within a host", "across": "across hosts", "all": "all ranks"}
    table = Table(title="Collective operations: time, and bytes that a rank sends a second")
    table.add_column("operation")
    table.add_column("bytes", justify="right")
    for scope in scopes:
        table.add_column(words[scope], justify="right")
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for each in collectives:
        wrong = "" if each["correct"] else " WRONG"
        text = f"{_time(each['seconds'])}  {each['bytes_per_second'] / 1e9:6.3f} GB/s{wrong}"
        cells.setdefault((each["operation"], each["bytes"]), {})[each["scope"]] = text
    for (operation, num_bytes), found in sorted(cells.items()):
        table.add_row(operation, _size(num_bytes), *[found.get(scope, "-") for scope in scopes])
    return table


def _links_table(links: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Links, slowest first")
    for column in ("from", "to", "between", "latency", "GB/s"):
        table.add_column(column)
    for scope in dict.fromkeys(link["scope"] for link in links):
        found = sorted((link for link in links if link["scope"] == scope), key=lambda link: link["bytes_per_second"])
        for link in found[:_MOST_LINKS]:
            rate = f"{link['bytes_per_second'] / 1e9:.3f}"
            table.add_row(str(link["source"]), str(link["target"]), scope, _time(link["latency_seconds"]), rate)
        if len(found) > _MOST_LINKS:
            middle = found[len(found) // 2]["bytes_per_second"] / 1e9
            table.add_row("...", f"{len(found)} in all", scope, "", f"median {middle:.3f}")
    return table


def _machine_table(machine: dict[str, Any]) -> Table:
    table = Table(title=f"One rank, all at work: {machine['name']}", show_header=False)
    for name, flops in machine["flops_per_second"].items():
        table.add_row(f"{name} products", f"{flops / 1e9:.4g} GFLOP/s")
    table.add_row("memory", f"{machine['memory_bytes_per_second'] / 1e9:.3g} GB/s, {_size(machine['memory_bytes'])}")
    table.add_row("a small operation", _time(machine["operation_seconds"]))
    for place, words in (("intra_node", "within a host"), ("inter_node", "across hosts")):
        for name, link in (machine[place] or {}).items():
            rate = f"{_time(link['latency_seconds'])} + bytes / {link['bytes_per_second'] / 1e9:.3g} GB/s"
            table.add_row(f"{name} {words}", rate)
    return table


def _size(num_bytes: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
