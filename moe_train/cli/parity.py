"""Command `moe-train parity`: train a small model in several layouts and compare losses and gradient norms by step.

Without a launcher, it starts the ranks of each layout on this machine. Under a launcher, each rank starts its own part
of each layout. So the hosts, the network and the devices of a cluster are checked.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from moe_train.cli.paths import path_argument
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.yaml_text import write_yaml
from moe_train.distributed.addresses import free_port
from moe_train.distributed.bootstrap import (
    child_environment,
    choose_device,
    discover_world,
    init_process_group,
)
from moe_train.distributed.world import World
from moe_train.launch.fork_server import ForkServer, wait_for_all

if TYPE_CHECKING:
    from moe_train.train.parity import Comparison, Layout
    from moe_train.train.telemetry.records import Record

RUN_TIMEOUT_SECONDS = 600
# Modules that training imports, early or late; the fork server imports them once for all ranks.
TRAINING_MODULES = (
    "torch",
    "moe_train.cli.main",
    "moe_train.cli.train",
    "moe_train.infer.closing_sample",
    "moe_train.train.training",
    "moe_train.train.telemetry.sinks.tensorboard",
    "setuptools",  # DeepSpeed imports it when it makes an engine
    "deepspeed.runtime.zero.muon.original_muon",  # the same; it also compiles a function: half of all import time
)


def run(arguments: Sequence[str]) -> int:
    """Train in every layout, compare the results and print them.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code: 0 if all layouts agree, else 1.

    Raises:
        UsageError: If an argument is wrong, or no layouts can be compared.
        RuntimeError: If a rank fails.

    Collective: All ranks of a launcher.
    """
    parser = Parser(
        prog="moe-train parity",
        description="Check that every layout of ranks gives the same losses and gradient norms. "
        "Any training option may follow; moe-train train --help lists them.",
        allow_abbrev=False,
    )
    help_text = (
        "check the model of this file, its shapes, precision and losses, in place of a small one; repeated, files are "
        "merged"
    )
    parser.add_argument("--config", type=path_argument, action="append", metavar="FILE", help=help_text)
    parser.add_argument("--layers", type=int, metavar="N", help="with --config: only so many layers of the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--max-ranks", type=int, help="leave out layouts of more ranks (default: 4, or the devices)")
    parser.add_argument("--layouts", metavar="N,N", help="run only these, counted from 0, with their references")
    parser.add_argument(
        "--keep", type=path_argument, metavar="DIR", help="folder for the run folders, which are removed otherwise"
    )
    options, extra = parser.parse_known_args(list(arguments))
    world = discover_world()
    if world.num_nodes > 1 and options.keep is None:
        raise UsageError(f"--keep is needed on {world.num_nodes} hosts: a folder that all of them see, for checkpoints")
    # A launcher sends this signal to the other ranks when one has failed. Their child processes must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="moe_train_parity_") as scratch:
        return _compare_layouts(options, extra, world, Path(options.keep or scratch))


def _compare_layouts(options: argparse.Namespace, extra: list[str], world: World, scratch: Path) -> int:
    import torch

    from moe_train.distributed.collectives import gather_objects
    from moe_train.host.precision import resolve_precision
    from moe_train.train.parity import SPLITS, choose_layouts, context_obstacle, options_for

    if options.layers is not None and options.config is None:
        raise UsageError(f"--layers ({options.layers}) has no effect without --config")
    base = options_for(extra) if options.config is None else _own_options(options, extra, scratch)
    config = load_config([*base, *extra, f"--train.run_dir={scratch}"], program="moe-train parity")
    device = choose_device(config.parallel.device, replace(world, local_world_size=1, local_rank=0))
    limit = _rank_limit(options.max_ranks, world, device.type)
    wanted = choose_layouts(options.layouts)
    skipped = {layout: "too few ranks or devices" for layout in wanted if layout.world_size > limit}
    for layout in wanted:
        if layout not in skipped and (obstacle := context_obstacle(config, layout)) is not None:
            skipped[layout] = obstacle
    compared = [layout for layout in wanted if layout not in skipped]
    if len(compared) < 2 and all(layout.world_size > limit for layout in skipped):
        raise UsageError(f"with {limit} rank or device nothing can be compared: give --parallel.device=cpu, or more")
    if len(compared) < 2:
        raise UsageError(f"--layouts ({options.layouts!r}): nothing can be compared: {'; '.join(skipped.values())}")
    if world.world_size > 1:
        init_process_group(world, torch.device("cpu"), RUN_TIMEOUT_SECONDS)
    own = resolve_precision(config.train.precision, device)
    precisions = list(dict.fromkeys(("fp32", own) if options.config is not None else (own,)))
    # The ports must be free on the host of rank 0, and all ranks of a run write to the folder of rank 0.
    ports = [free_port() for _ in range(len(precisions) * (len(SPLITS) + len(compared)))]
    folder, ports = gather_objects((scratch, ports))[0]
    with _fork_server(world, device.type) as server:
        runs = _Runs(base, extra, device.type, world, folder, ports, server)
        results: list[Comparison] = []
        for number, precision in enumerate(precisions):
            prefix = f"{precision}_" if number else ""  # of the run folders
            results += _compare_in(precision, compared, runs, prefix, options.json)
    if world.rank != 0:
        return 0
    passed = all(result.passed for result in results)
    _show(results, skipped, options.json, passed)
    return 0 if passed else 1


@dataclass
class _Runs:
    """Short runs of one model in several layouts.

    Attributes:
        base: Training options of every run.
        extra: Options of the command line, which count more.
        device_type: Type of the devices.
        world: Place of this process.
        folder: Folder of the run folders.
        ports: Free ports, one for each run.
        server: Fork server of the ranks; None: each rank has its own interpreter.
    """

    base: list[str]
    extra: list[str]
    device_type: str
    world: World
    folder: Path
    ports: list[int]
    server: ForkServer | None

    def train(self, layout: "Layout", name: str, precision: str) -> "list[Record]":
        """Train in a layout; the records, on rank 0. Collective: All ranks of a launcher."""
        from moe_train.distributed.collectives import barrier
        from moe_train.train.telemetry.records import read_records

        run_dir = self.folder / name
        arguments = [*self.base, *layout.options(), *self.extra, f"--train.run_dir={run_dir}"]
        arguments += [f"--parallel.device={self.device_type}", f"--train.precision={precision}"]
        _run_layout(arguments, layout.world_size, self.world, self.ports.pop(), self.server)
        barrier()
        return read_records(run_dir / "metrics.jsonl") if self.world.rank == 0 else []


def _compare_in(
    precision: str, layouts: "Sequence[Layout]", runs: _Runs, prefix: str, quiet: bool
) -> "list[Comparison]":
    """Train in every layout in one precision; the comparisons, on rank 0. Collective: All ranks of a launcher."""
    from moe_train.train.parity import SPLITS, Bounds, bounds_of_spread, compare

    bounds = Bounds()
    if precision != "fp32":
        split = [runs.train(layout, f"{prefix}split_{i}", precision) for i, layout in enumerate(SPLITS)]
        bounds = bounds_of_spread([compare(SPLITS[i], split[i], split[0]) for i in range(1, len(SPLITS))])
    reference: dict[bool, list[Record]] = {}
    results = []
    for index, layout in enumerate(layouts):
        records = runs.train(layout, f"{prefix}layout_{index:02d}", precision)
        if runs.world.rank == 0:
            first = reference.setdefault(layout.ignores, records)
            results.append(compare(layout, records, first, bounds, precision))
            if not quiet:
                print(f"{'same ' if results[-1].passed else 'OTHER'}  {precision}  {layout.name}", flush=True)
    return results


def _own_options(options: argparse.Namespace, extra: list[str], scratch: Path) -> list[str]:
    """Make options that train the model of a configuration: a file with what decides its numbers, and a short run."""
    from moe_train.train.parity import RUN_OPTIONS, own_model

    given = [*(f"--config={file}" for file in options.config), f"--train.run_dir={scratch}"]
    values = own_model(load_config([*given, *extra], program="moe-train parity"), options.layers)
    path = scratch / f"parity_{os.getpid()}.yaml"  # each rank its own, where they share the folder
    path.write_text(write_yaml(values), encoding="utf-8")
    return [f"--config={path}", *RUN_OPTIONS]


def _rank_limit(wanted: int | None, world: World, device_type: str) -> int:
    from moe_train.host.gpus import num_devices

    available = world.world_size if world.world_size > 1 else num_devices(device_type)
    if wanted is not None and available is not None and wanted > available:
        raise UsageError(f"--max-ranks ({wanted}) exceeds the ranks or devices there are ({available})")
    return wanted or available or 4


def _fork_server(world: World, device_type: str) -> contextlib.AbstractContextManager[ForkServer | None]:
    """Make a fork server if all ranks are on this machine and on the CPU. None on CUDA, which must not be forked."""
    if world.world_size > 1 or device_type != "cpu":
        return contextlib.nullcontext()
    environment = child_environment(_place(0, 1, world, 0), one_thread=True)
    return ForkServer(TRAINING_MODULES, environment | {"DS_ACCELERATOR": device_type})


def _run_layout(arguments: list[str], world_size: int, world: World, port: int, server: ForkServer | None) -> None:
    ranks = range(world_size) if world.world_size == 1 else [r for r in (world.rank,) if r < world_size]
    places = [_place(rank, world_size, world, port) for rank in ranks]
    environments = [child_environment(place, one_thread=world.world_size == 1) for place in places]
    run = _run_commands(arguments, environments) if server is None else _run_forked(arguments, environments, server)
    failed = [(code, text) for code, text in run if code]
    if failed:
        code, text = failed[0]
        message = f"a rank of {world_size} ended with code {code}:\n{text[-3000:]}"
        raise UsageError(message) if code == 2 else RuntimeError(message)


def _run_forked(arguments: list[str], environments: list[dict[str, str]], server: ForkServer) -> list[tuple[int, str]]:
    """Run training ranks that are forked from the server, and return their exit codes and outputs."""
    command = ["train", *arguments]
    ranks = [server.start("moe_train.cli.main:main", command, environment) for environment in environments]
    results = wait_for_all(ranks, RUN_TIMEOUT_SECONDS)
    return [(result.returncode, result.stdout + result.stderr) for result in results]


def _run_commands(arguments: list[str], environments: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Run training ranks, each in its own interpreter, and return their exit codes and outputs."""
    command = [sys.executable, "-m", "moe_train", "train", *arguments]
    children: list[subprocess.Popen[str]] = []
    try:
        for environment in environments:
            children.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs = [child.communicate(timeout=RUN_TIMEOUT_SECONDS)[0] for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    return [(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


def _place(rank: int, world_size: int, world: World, port: int) -> World:
    if world.world_size == 1:  # all ranks are here
        return World(rank, world_size, rank, world_size, 1, 0, "127.0.0.1", port, "environment")
    local_world_size = min(world.local_world_size, world_size)
    return replace(
        world,
        rank=rank,
        world_size=world_size,
        local_world_size=local_world_size,
        num_nodes=-(-world_size // local_world_size),
        master_port=port,
        launcher="environment",
    )


def _show(results: "Sequence[Comparison]", skipped: "dict[Layout, str]", as_json: bool, passed: bool) -> None:
    from moe_train.train.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE

    if as_json:
        summary = {
            "passed": passed,
            "loss_tolerance": LOSS_TOLERANCE,
            "grad_norm_tolerance": GRAD_NORM_TOLERANCE,
            "layouts": [result.as_dict() for result in results],
            "skipped": [layout.name for layout in skipped],
        }
        print(json.dumps(summary))
        return
    table = Table(title=f"Largest relative difference over {results[0].steps} steps, from the first row of its kind")
    for column in ("layout", "", "train/loss", "at most", "train/grad_norm", "at most", ""):
        table.add_column(column)
    for result in results:
        bounds = result.bounds
        table.add_row(
            result.layout.name,
            result.precision,
            f"{result.loss_difference:.1e}",
            f"{bounds.loss:.1e}",
            f"{result.grad_norm_difference:.1e}",
            f"{bounds.grad_norm:.1e}",
            "same" if result.passed else "OTHER",
        )
    Console().print(table)
    for layout, reason in skipped.items():
        print(f"left out, {reason}: {layout.name}")
