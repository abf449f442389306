"""Command `moe-train doctor`: examine the ranks, hosts and links that a launcher gives, before a run."""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.cli.paths import path_argument
from moe_train.config.base import field_values, merge
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.parts import load_kinds
from moe_train.config.resolve import resolve_sizes
from moe_train.config.root import Config
from moe_train.distributed.addresses import choose_interface
from moe_train.distributed.bootstrap import (
    choose_device,
    discover_world,
    environment,
    export_world,
    set_threads,
)
from moe_train.distributed.world import World

if TYPE_CHECKING:
    import torch

    from moe_train.host.precision import Precision

DESCRIPTION = """Examine ranks, hosts and links before a run: what should be equal on all ranks, the shared folder,
devices, clocks, the numbers and times of collective operations, slow and broken links. Start it as training is started.
Any training option may follow; moe-train train --help lists them. Exit code 0: all is well; 1: a problem was found."""
_SIZES = {"cpu": (2**10, 2**14, 2**18, 2**22, 2**24), "cuda": (2**10, 2**14, 2**18, 2**22, 2**24, 2**26, 2**28)}
_BUDGET_SECONDS, _QUICK_BUDGET_SECONDS = 3.0, 1.0
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_NO_RUN_DIR = "unknown"


@dataclass(frozen=True)
class _Setting:
    """Settings of one rank. A failure is not raised here; it is first compared with the other ranks.

    Attributes:
        config: Configuration; None: no options of the configuration were given, or a failure.
        fields: Its fields by dotted name, with the sizes that the world gives.
        device: Device of this rank; the CPU after a failure.
        precisions: Precisions in which products are measured.
        failure: Message of a failure; "" without one.
        unwritable: Reason why rank 0 cannot write --output; "" if it can.
    """

    config: Config | None
    fields: dict[str, str]
    device: "torch.device"
    precisions: "tuple[Precision, ...]"
    failure: str
    unwritable: str


def run(arguments: Sequence[str]) -> int:
    """Examine ranks, hosts and links, and print a report.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code: 0 if no problem was found, else 1.

    Raises:
        UsageError: If an argument is wrong.

    Collective: All ranks of a launcher.
    """
    options, rest = _parser().parse_known_args(list(arguments))
    sizes = None if options.sizes is None else _read_sizes(options.sizes)
    _check_numbers(options)
    world = discover_world()
    setting = _read_setting(rest, options, world)

    from moe_train.doctor.examine import Examination
    from moe_train.doctor.facts import collect_facts
    from moe_train.doctor.request import Request

    config = setting.config
    threads = set_threads(config.parallel.threads_per_rank if config else "auto", world)
    # Options that must be equal on all ranks, because they decide how ranks communicate. A folder is not among them: it
    # may have another name on each host.
    alike = {"sizes": options.sizes or "", "quick": str(options.quick), "timeout": f"{options.timeout:g}"}
    facts = collect_facts(world, setting.device, threads, setting.fields, setting.failure, alike, environment())
    export_world(world, setting.device)
    request = Request(
        world=world,
        device=setting.device,
        facts=facts,
        precisions=setting.precisions,
        sizes=sizes or _SIZES[setting.device.type],
        budget_seconds=_QUICK_BUDGET_SECONDS if options.quick else _BUDGET_SECONDS,
        timeout_seconds=options.timeout,
        expected=None if options.expect_bandwidth is None else options.expect_bandwidth * 1e9,
        folder=_shared_folder(options.shared_dir, config),
        unwritable=setting.unwritable,
    )
    output = None if options.output is None else Path(options.output)
    closed = list[BrokenPipeError]()

    def show(report: dict[str, Any]) -> None:
        try:
            _show(report, options.json, output)
        except BrokenPipeError as error:  # the reader is gone; the other ranks still need the result
            closed.append(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the buffered output is flushed once more

    try:
        code = Examination(request, show, _say).run()
    except ConnectionError as error:
        print(f"moe-train doctor: {error}", file=sys.stderr, flush=True)
        return 1
    if closed:
        raise closed[0]
    return code


def _check_numbers(options: argparse.Namespace) -> None:
    if not 0 < options.timeout < math.inf:
        raise UsageError(f"--timeout ({options.timeout:g}) must be more than 0 seconds, and finite")
    if options.expect_bandwidth is not None and not 0 < options.expect_bandwidth < math.inf:
        raise UsageError(f"--expect-bandwidth ({options.expect_bandwidth:g}) must be more than 0 GB/s, and finite")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moe-train doctor", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--shared-dir",
        type=path_argument,
        metavar="DIR",
        help="folder that all hosts should share (default: where train.run_dir is)",
    )
    add("--sizes", metavar="N,N", help="bytes of collective operations, as 1K,4M (default: 1K to 16M; CUDA: to 256M)")
    add("--quick", action="store_true", help="a third of the time for measurements")
    add("--timeout", type=float, default=20.0, metavar="S", help="a link or rank is broken after these seconds (20)")
    add("--expect-bandwidth", type=float, metavar="GB/S", help="problem if two hosts send each other less than that")
    add("--json", action="store_true", help="print one JSON object as the last line")
    add(
        "--output",
        type=path_argument,
        metavar="FILE",
        help="write that object to a file, for moe-train plan --device FILE",
    )
    return parser


def _read_sizes(text: str) -> tuple[int, ...]:
    sizes = set()
    for part in text.split(","):
        number, unit = (part[:-1], part[-1]) if part[-1:].upper() in _UNITS else (part, "")
        if not number.strip().isdecimal() or int(number) == 0:
            raise UsageError(f"--sizes ({text!r}) must be bytes with commas between them, such as 1K,64K,4M")
        sizes.add(int(number) * _UNITS.get(unit.upper(), 1))
    return tuple(sorted(sizes))


def _read_setting(rest: list[str], options: argparse.Namespace, world: World) -> _Setting:
    from moe_train.host.precision import describe_device, resolve_precision

    config, fields, unwritable = None, {}, _check_output(options.output) if world.rank == 0 else ""
    cpu = choose_device("cpu", world, {})
    try:
        if rest:
            config = load_config(rest, program="moe-train doctor", defaults={"train": {"run_dir": _NO_RUN_DIR}})
        device = choose_device(config.parallel.device if config else "auto", world)
        choose_interface(config.parallel.network_interface if config else None, environment())
        precision = resolve_precision(config.train.precision if config else "auto", device)
        if config is not None:
            sizes = resolve_sizes(config, world, describe_device(device), load_kinds(config))
            fields = dict(field_values(merge(config.model_dump(mode="json"), sizes.updates())))
    except UsageError as error:
        return _Setting(None, {}, cpu, ("fp32",), str(error), unwritable)
    texts = {name: str(value) for name, value in fields.items()}
    return _Setting(config, texts, device, tuple(dict.fromkeys(("fp32", precision))), "", unwritable)


def _check_output(output: str | None) -> str:
    """Return the reason why the output file cannot be written; "" if it can."""
    if output is None:
        return ""
    folder = Path(output).absolute().parent
    if not folder.is_dir():
        return f"--output ({output}): there is no folder {folder}"
    if not os.access(folder, os.W_OK) or Path(output).is_dir():
        return f"--output ({output}): cannot be written"
    return ""


def _shared_folder(given: str | None, config: Config | None) -> Path | None:
    if given is not None:
        return Path(given)
    if config is None or config.train.run_dir == _NO_RUN_DIR:
        return None
    return Path(config.train.run_dir).absolute().parent


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the reader is gone
        print(f"doctor: {text}", file=sys.stderr, flush=True)


def _show(report: dict[str, Any], as_json: bool, output: Path | None) -> None:
    from rich.console import Console

    from moe_train.doctor.report import show_report

    if output is not None:
        try:
            output.write_text(json.dumps(report) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"moe-train doctor: --output ({output}): cannot be written: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps(report), flush=True)
    else:
        console = Console()
        with console.capture() as captured:  # rich would end the process if the output is closed
            show_report(report, console)
        print(captured.get(), end="", flush=True)
