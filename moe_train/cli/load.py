"""Command `moe-train load`: show the load of a run's experts, from its metrics.jsonl, also while it runs."""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moe_train.cli.paths import path_argument
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.train.telemetry.load_report import expert_load, layer_table, load_table
from moe_train.train.telemetry.records import read_records


def run(arguments: Sequence[str]) -> int:
    """Print the load of the experts over the last steps of a run.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code 0.

    Raises:
        UsageError: If an argument is wrong, or the run has no records of experts.
    """
    parser = Parser(
        prog="moe-train load",
        description="Show the load of every expert over the last steps of a run, the worst layers first.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="the run's folder (train.run_dir)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps to cover (default: the last 100)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layers", type=int, metavar="N", help="show only the N worst layers")
    which.add_argument("--layer", type=int, metavar="NN", help="show every expert of one layer, the busiest first")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(list(arguments))
    for name in ("steps", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} ({value}) must be 1 or more")
    _show(options)
    return 0


def _show(options: argparse.Namespace) -> None:
    path = Path(options.run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"RUN_DIR ({options.run_dir!r}): has no metrics.jsonl; give the train.run_dir of a run")
    report = expert_load(read_records(path), options.steps)
    if report is None:
        raise UsageError(
            f"RUN_DIR ({options.run_dir!r}): no record tells of experts; the model has no MoE layer, telemetry.experts "
            "is false, or the first record is yet to come"
        )
    chosen = report.layers[: options.layers]
    if options.layer is not None:
        chosen = [load for load in report.layers if load.layer == options.layer]
        if not chosen:
            known = ", ".join(str(load.layer) for load in sorted(report.layers, key=lambda load: load.layer))
            raise UsageError(f"--layer ({options.layer}) is no MoE layer of this run: {known}")
    if options.json:
        print(json.dumps(report.as_dict() | {"layers": [load.as_dict() for load in chosen]}))
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an output encoding may lack block characters
    console = Console(highlight=False)
    if options.layer is not None:
        console.print(layer_table(chosen[0]))
    else:
        console.print(load_table(report, options.layers))
    for warning in report.alarms:
        console.print(f"warning: {warning}", style="red", markup=False)
