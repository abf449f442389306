"""Command `moe-train plan`: compute memory, traffic and time of a configuration on a cluster, without the cluster."""

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from moe_train.cli.params import known_vocab_size
from moe_train.cli.paths import path_argument
from moe_train.config.base import merge
from moe_train.config.command_line import Parser, read_command_line
from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml, load_config, validate_config
from moe_train.config.root import Config
from moe_train.train.engine.settings import check_additions

if TYPE_CHECKING:
    from moe_train.plan.planner import Plan, Question
    from moe_train.plan.search import Found
    from moe_train.plan.whole_run import WholeRun

Amount = TypeVar("Amount", int, float)
EXIT_NOTHING_FITS = 1  # --search found no layout
_SHOWN = 8  # layouts of a search that are printed
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}  # of a number of tokens
_MOST_TOKENS = 10**18
_FIELD = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+=")  # a word of --compare that is no file
_PROGRAM = "moe-train plan"

DESCRIPTION = """Say what a configuration takes on a cluster: memory of a rank by part, bytes inside and across nodes,
time of a step. Nothing is allocated and no rank is started; paths under data need not exist. Any training option may
follow; moe-train train --help lists them. Exit code 0: planned, whether or not it fits ("fits" in the JSON); 1:
--search found nothing that fits; 2: bad input."""


def run(arguments: Sequence[str]) -> int:
    """Plan a configuration and print the plan.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code: 0, or 1 if --search found no layout that fits.

    Raises:
        UsageError: If an argument is wrong.
    """
    options, rest = _parser().parse_known_args(list(arguments))
    _check_options(options)
    config = _load(rest, options.config)
    question, size = _question(options), known_vocab_size(config)
    if options.search:
        return _search(config, size, question, options)
    from moe_train.plan.planner import make_plan

    second = None if options.compare is None else _second_config(config, rest, options.compare)
    plan = make_plan(config, size, question)
    if second is None:
        _show(plan, options)
    else:
        _compare(plan, _plan_second(second, question), options)
    return 0


def _load(rest: Sequence[str], files: Sequence[str]) -> Config:
    arguments = [*rest, *(f"--config={file}" for file in files)]
    config = load_config(arguments, program=_PROGRAM, defaults={"train": {"run_dir": "runs/planned"}})
    check_additions(config)
    return config


def _second_config(first: Config, rest: Sequence[str], words: Sequence[str]) -> Config:
    """Make the configuration that --compare describes: files in place of those of --config, or the same, and fields."""
    files = [word for word in words if not _FIELD.match(word)]
    base = _load(rest, files) if files else first
    changes = read_command_line([f"--{word}" for word in words if _FIELD.match(word)], program=_PROGRAM)
    config = validate_config(merge(base.model_dump(mode="json"), changes.values), origin="--compare")
    check_additions(config)
    return config


def _plan_second(config: Config, question: "Question") -> "Plan":
    from moe_train.plan.planner import make_plan

    try:
        return make_plan(config, known_vocab_size(config), question)
    except UsageError as error:
        raise UsageError(f"--compare: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=_PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="YAML file of the run; repeated, they are merged")
    add("--nodes", default="1", metavar="N", help="nodes (default: 1)")
    add("--gpus-per-node", default="1", metavar="G", help="ranks of a node (default: 1)")
    add(
        "--device",
        type=path_argument,
        metavar="NAME",
        help="h100, h200, a100, mi300x, or a file of moe-train doctor --json",
    )
    add("--inter-node-gbps", metavar="X", help="gigabits per second of each device's port between nodes (400)")
    add("--imbalance", default="0", metavar="X", help="coefficient of variation of the experts' loads (0: by chance)")
    add(
        "--loads",
        type=path_argument,
        metavar="RUN_DIR",
        help="loads of the experts as a run had them, in place of --imbalance",
    )
    add("--seed", default="0", metavar="N", help="of the draws of loads (default: 0)")
    add("--decode", nargs=2, metavar=("BATCH", "LENGTH"), help="keys and values of these sequences beside training")
    add("--tokens", metavar="N", help="hours, GPU-hours and checkpoints of a run to N tokens: 15e12, 2T, 100B, 500M")
    add(
        "--compare",
        nargs="+",
        metavar="CHANGE",
        help="plan a second layout beside the first: SECTION.FIELD=VALUE, as many as differ, or FILE in place of "
        "--config's files; options that name fields hold for both",
    )
    add("--search", action="store_true", help="find the fastest layout that fits, with the same global batch")
    add("--margin", metavar="X", help="share of the memory that --search leaves free (0.05)")
    add(
        "--output",
        type=path_argument,
        metavar="FILE",
        help="write the configuration that --search found, in place of printing it",
    )
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    """Convert option texts to numbers, and refuse values that are out of range or have no effect."""
    for name in ("nodes", "gpus_per_node"):
        setattr(options, name, _number(name, getattr(options, name), int, 1))
    options.seed = _number("seed", options.seed, int, 0)
    options.imbalance = _number("imbalance", options.imbalance, float, 0.0)
    if options.inter_node_gbps is not None:
        options.inter_node_gbps = _number("inter_node_gbps", options.inter_node_gbps, float, 1e-3)
        if options.nodes == 1:
            raise UsageError(f"--inter-node-gbps ({options.inter_node_gbps:g}) has no effect with --nodes (1)")
    if options.decode is not None:
        options.decode = [_number("decode", value, int, 1) for value in options.decode]
    for name in ("margin", "output"):
        if getattr(options, name) is not None and not options.search:
            raise UsageError(f"--{name} ({getattr(options, name)}) has no effect without --search")
    if options.compare is not None and options.search:
        raise UsageError("--compare has no effect with --search, which compares layouts itself: give one")
    if options.tokens is not None:
        options.tokens = _count_of_tokens(options.tokens)
    options.margin = _number("margin", "0.05" if options.margin is None else options.margin, float, 0.0)
    if options.margin >= 1:
        raise UsageError(f"--margin ({options.margin:g}) must be a share of the memory, below 1")
    if options.loads is not None and options.imbalance:
        raise UsageError(f"--imbalance ({options.imbalance:g}) has no effect with --loads ({options.loads}): give one")
    if options.device is None:
        raise UsageError("--device is missing: h100, h200, a100, mi300x, or a file of moe-train doctor --json")


def _number(name: str, text: str, kind: type[Amount], least: Amount) -> Amount:
    option = f"--{name.replace('_', '-')}"
    try:
        value = kind(text)
    except ValueError:
        raise UsageError(f"{option} ({text!r}) must be {'a whole' if kind is int else 'a'} number") from None
    if not least <= value < float("inf"):
        raise UsageError(f"{option} ({text}) must be {least:g} or more")
    return value


def _count_of_tokens(text: str) -> int:
    """Read a number of tokens: 1500, 15e12, 1_000_000, 100B, 2.5T."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        count = Decimal(text[:-1] if factor > 1 else text) * factor
    except InvalidOperation:
        count = Decimal("NaN")
    if not count.is_finite() or not 1 <= count <= _MOST_TOKENS or count != count.to_integral_value():
        raise UsageError(f"--tokens ({text!r}) must be a whole number of tokens up to 1e18, such as 15e12, 100B or 2T")
    return int(count)


def _question(options: argparse.Namespace) -> "Question":
    from moe_train.plan.devices import find_device
    from moe_train.plan.layout import Cluster
    from moe_train.plan.memory import Decoding
    from moe_train.plan.planner import Question
    from moe_train.plan.run_loads import read_shares

    return Question(
        Cluster(options.nodes, options.gpus_per_node, find_device(options.device, options.inter_node_gbps)),
        imbalance=options.imbalance,
        seed=options.seed,
        shares_LE=None if options.loads is None else read_shares(Path(options.loads)),
        decoding=None if options.decode is None else Decoding(*options.decode),
        margin=options.margin if options.search else 0.0,
    )


def _run_of(plan: "Plan", options: argparse.Namespace) -> "WholeRun | None":
    from moe_train.plan.whole_run import plan_run

    return None if options.tokens is None else plan_run(plan, options.tokens)


def _show(plan: "Plan", options: argparse.Namespace) -> None:
    from moe_train.plan.report import show_plan

    if options.json:
        print(json.dumps(_as_dict(plan, options)))
    else:
        show_plan(plan, _console(), _run_of(plan, options))


def _as_dict(plan: "Plan", options: argparse.Namespace) -> dict[str, Any]:
    run = _run_of(plan, options)
    return plan.as_dict() | ({} if run is None else {"run": run.as_dict()})


def _compare(first: "Plan", second: "Plan", options: argparse.Namespace) -> None:
    from moe_train.plan.comparison import Side, compare, show_comparison

    sides = Side(first, _run_of(first, options)), Side(second, _run_of(second, options))
    if options.json:
        print(json.dumps(compare(*sides)))
    else:
        show_comparison(*sides, _console())


def _search(config: Config, size: int, question: "Question", options: argparse.Namespace) -> int:
    from moe_train.plan.planner import make_plan
    from moe_train.plan.report import show_candidates
    from moe_train.plan.search import apply_layout, search

    found = search(config, size, question)
    if not found.best:
        _show_nothing(found, question, options.json)
        return EXIT_NOTHING_FITS
    chosen = apply_layout(config, found.best[0].layout)
    text = dump_yaml(chosen)
    if options.output is not None:
        try:
            Path(options.output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output ({options.output}): cannot be written: {error}") from error
    plan = make_plan(chosen, size, question)
    if options.json:
        print(json.dumps(_as_dict(plan, options) | {"tried": found.tried, "config": chosen.model_dump(mode="json")}))
        return 0
    console = _console()
    show_candidates(found.best[:_SHOWN], found.tried, console)
    _show(plan, options)
    if options.output is None:
        print(f"\n{text}", end="")
    else:
        console.print(f"configuration written to {options.output}", markup=False)
    return 0


def _show_nothing(found: "Found", question: "Question", as_json: bool) -> None:
    capacity, host_capacity = question.capacity, question.host_capacity
    room, least, host = capacity / 2**30, found.smallest.total / 2**30, ""
    if host_capacity is not None and found.smallest.host_total > host_capacity:
        in_host = found.smallest.host_total / 2**30
        host = f", and {in_host:.1f} of {host_capacity / 2**30:.1f} GiB in the memory of its host"
    print(
        f"moe-train plan: none of {found.tried:,} layouts fits: the smallest takes {least:.1f} of {room:.1f} GiB a "
        f"rank{host}; take more nodes, or train.sequence_length or a model that are smaller",
        file=sys.stderr,
    )
    if as_json:
        smallest = {
            "memory": {name: int(held) for name, held in found.smallest.parts.items()},
            "memory_total": int(found.smallest.total),
            "memory_capacity": int(capacity),
            "memory_moment": found.smallest.moment,
        }
        print(json.dumps({"fits": False, "tried": found.tried, "smallest": smallest}))


def _console() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an output encoding may lack block characters
    return Console(highlight=False)
