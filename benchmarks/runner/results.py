"""What a benchmark tells: its machine, progress, tables, claims, charts and files."""

import argparse
import importlib.util
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.host.cores import usable_cores

_CPUINFO = Path("/proc/cpuinfo")
_BF16_INSTRUCTIONS = {"avx512_bf16": "AVX-512", "amx_bf16": "AMX"}  # by their names in _CPUINFO
_CHART_DPI = 110


def say(line: str) -> None:
    """Print a line of progress, or a message, to stderr; figures go to stdout."""
    print(line, file=sys.stderr, flush=True)


def describe_machine(*packages: str, threads: int | None = None, gpu: str | None = None) -> dict[str, Any]:
    """Where figures come from: plain values for JSON.

    Args:
        packages: Distributions whose version matters besides torch's.
        threads: CPU threads of torch, where one number holds for the whole benchmark.
        gpu: Name of the GPU that it runs on; None: it runs on the CPU.

    Returns:
        cpu, cores, bf16 (instruction sets of the CPU that multiply bf16 matrices), torch, and what was given; the
        version of a package that is not installed is None.
    """
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = known.get("flags", "").split()
    machine: dict[str, Any] = {
        "cpu": known.get("model name") or platform.processor() or os.uname().machine,
        "cores": usable_cores(),
        "bf16": [name for flag, name in _BF16_INSTRUCTIONS.items() if flag in flags],
    }
    machine |= {} if threads is None else {"threads": threads}
    machine |= {} if gpu is None else {"gpu": gpu}
    return machine | {package: _installed(package) for package in ("torch", *packages)}


def machine_words(machine: dict[str, Any]) -> str:
    """One line about the machine that `describe_machine` described."""
    cores = f"{machine['cores']} {'core' if machine['cores'] == 1 else 'cores'} of {machine['cpu']}"
    cores += f" with bf16 by {' and '.join(machine['bf16'])}" if machine["bf16"] else " without bf16 instructions"
    parts = [machine["gpu"]] if "gpu" in machine else []
    parts.append(cores)
    if "threads" in machine:
        parts.append(f"{machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}")
    known = ("cpu", "cores", "bf16", "threads", "gpu")
    parts += [f"{name} {value or 'not installed'}" for name, value in machine.items() if name not in known]
    return ", ".join(parts)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def claim_lines(claims: Sequence[dict[str, Any]]) -> list[str]:
    """A list in Markdown: each claim, and whether this run of the benchmark bears it out.

    Args:
        claims: For each: claim, in words with its figures; holds.
    """
    return [f"- {'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}" for claim in claims]


def require_matplotlib() -> None:
    """Check that charts can be drawn, before anything is measured.

    Raises:
        UsageError: matplotlib is not installed; with the command that installs it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the chart needs matplotlib: pip install -c requirements/constraints.txt -e '.[bench]'")


def new_figure(columns: int, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """An empty figure of matplotlib and its panels, side by side.

    Args:
        columns: Number of panels.
        width: Width in inches.
        height: Height in inches.
        options: Options of `Figure.subplots`.
    """
    from matplotlib.figure import Figure  # an optional extra

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **options)[0])


def png_of(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_CHART_DPI)
    return file.getvalue()


def write_results(folder: Path, name: str, page: str, chart: bytes | None = None) -> None:
    """Write NAME.md and, with a chart, NAME.png; print the page.

    Args:
        folder: Where to write; it exists.
        name: File name without its ending.
        page: Text in Markdown.
        chart: Contents of the PNG file.
    """
    _write_whole(folder / f"{name}.md", page.encode())
    if chart is not None:
        _write_whole(folder / f"{name}.png", chart)
    print(page)


def print_json(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print one JSON object as the last line of stdout, if --json asks for it.

    Args:
        options: Command line of the benchmark.
        figures: Plain values and dataclasses of them.
    """
    if options.json:
        print(json.dumps(figures, default=asdict))


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
