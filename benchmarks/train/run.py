"""How fast moe_train trains, beside Hugging Face's Mixtral under DeepSpeed ZeRO-1 and under DeepSpeed AutoEP.

The same model, tokens, optimizer, precision and ranks. In every round each system trains as a fresh group of ranks on
the CPUs of this machine, joined by gloo. moe_train is launch/train.py with all that it does for its user, records
among it; the peers are the least loop that trains.

    python -m benchmarks.train [--json] [--rounds 5] [--steps 20] [--ranks 2] [--ours "NAME=--section.field=value ..."]
"""

import argparse
import importlib.util
import operator
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.resolved import resolve_for
from benchmarks.runner.results import describe_machine, print_json, say
from benchmarks.runner.rounds import run_rounds
from benchmarks.train.report import show
from benchmarks.train.rows import (
    AUTOEP,
    FORMS,
    OURS,
    PEERS,
    STEPS_PER_RECORD,
    Outcome,
    Peer,
    Setting,
    choose_form,
    claims_of,
    rows_of,
    run_peer,
    run_trainer,
    trainer_options,
)
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.root import Config
from moe_train.data import prepare_data
from moe_train.host.cores import usable_cores
from moe_train.host.precision import resolve_precision

_SIZES = {
    "hidden": (256, "hidden_size"),
    "layers": (4, "blocks, each with an MoE layer"),
    "heads": (4, "query heads"),
    "kv_heads": (2, "key and value heads"),
    "experts": (8, "experts of a layer, over all ranks"),
    "top_k": (2, "experts of a token"),
    "inner": (512, "intermediate_size of an expert"),
    "vocabulary": (4096, "entries of the BPE trained on the data"),
    "sequence": (256, "tokens of a sequence"),
    "micro_batch": (4, "sequences of a rank in a step"),
    "ranks": (2, "processes"),
    "steps": (20, "timed steps of a run"),
}
_KEPT_FIELDS = (
    *("train.steps", "train.global_batch_size", "train.sequence_length", "train.run_dir"),
    *("telemetry.every", "telemetry.tensorboard", "data"),
)


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    """Read the command line, checked."""
    parser = BenchmarkParser("train", __doc__, epilog="About fifteen minutes on two cores; needs 4 GB of memory.")
    add = parser.add_argument
    add("--systems", nargs="+", choices=(OURS, *PEERS), default=(OURS, *PEERS), metavar="NAME", help="which (all)")
    for name, (default, what) in _SIZES.items():
        parser.add_number(f"--{name.replace('_', '-')}", default, what)
    parser.add_number("--rounds", 5, "runs of every system")
    parser.add_number("--threads", None, "threads of a rank (default: the cores divided among the ranks)")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: as the trainer chooses")
    add(
        "--plain-peers",
        action="store_true",
        help="leave the peers' C library as it is; else it keeps freed memory for them, as the trainer has it do",
    )
    add(
        "--ours",
        action="append",
        default=[],
        metavar='"NAME=OPTIONS"',
        help='a further row: the trainer with further options, as in "compiled=--train.compile=true"; repeatable',
    )
    options = parser.read(arguments)
    if options.threads is None:
        options.threads = max(1, usable_cores() // options.ranks)
    _check_sizes(parser, options)
    options.ours = _further_rows(parser, options.ours)
    sizes = {name: getattr(options, name) for name in (*_SIZES, "threads")}
    return options, Setting(**sizes, dtype=resolve_precision(options.dtype, torch.device("cpu")))


def _check_sizes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for large, small in (("hidden", "heads"), ("heads", "kv_heads"), ("experts", "ranks")):
        if getattr(options, large) % getattr(options, small):
            shown = f"--{small.replace('_', '-')} ({getattr(options, small)})"
            parser.error(f"--{large} ({getattr(options, large)}) must be divisible by {shown}")
    if options.top_k > options.experts:
        parser.error(f"--top-k ({options.top_k}) must be at most --experts ({options.experts})")
    if options.steps % STEPS_PER_RECORD:
        parser.error(f"--steps ({options.steps}) must be a multiple of {STEPS_PER_RECORD}, where the trainer records")


def _further_rows(parser: argparse.ArgumentParser, given: list[str]) -> dict[str, list[str]]:
    """Options of the trainer by the name of their row."""
    rows: dict[str, list[str]] = {}
    for text in given:
        name, _, rest = text.partition("=")
        try:
            options = shlex.split(rest)
        except ValueError as error:
            parser.error(f"--ours ({text!r}): {error}")
        if not name or not options or any(not option.startswith("--") for option in options):
            parser.error(f'--ours ({text!r}) must be "NAME=--section.field=value ..."')
        if name in (OURS, *PEERS, *rows):
            parser.error(f"--ours ({text!r}): there is a row {name!r} already")
        rows[name] = options
    return rows


def check_rows(setting: Setting, further: dict[str, list[str]]) -> Config:
    """Configuration of the trainer; those of the further rows are read and checked too.

    Raises:
        UsageError: The trainer would refuse one of them, or one changes how a row is measured.
    """

    def load(options: list[str]) -> Config:
        config = load_config([*trainer_options(setting), *options, "--train.run_dir=run"], program="benchmarks.train")
        return resolve_for(config, setting.ranks)

    ours = load([])
    for name, options in further.items():
        try:
            config = load(options)
        except UsageError as error:
            raise UsageError(f"--ours {name}: {error}") from error
        for field in _KEPT_FIELDS:
            given, kept = (operator.attrgetter(field)(each) for each in (config, ours))
            if given != kept:
                raise UsageError(f"--ours {name}: {field} ({given}) must stay {kept}: it is how a row is measured")
    return ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    options, setting = parse_options(arguments)
    config = check_rows(setting, options.ours)
    prepare_data(  # once for all runs
        config.data,
        sequence_length=setting.sequence,
        seed=config.train.seed,
        min_sequences=setting.global_batch,
        show_progress=True,
    )
    with tempfile.TemporaryDirectory(prefix="moe_train_train_") as folder:
        peers, left_out = choose_peers(options, setting, Path(folder))
        outcomes = measure(options, setting, peers, Path(folder))
    rows = rows_of(setting, outcomes, details_of(setting, peers, options))
    figures: dict[str, Any] = {
        "machine": describe_machine("deepspeed", "transformers"),
        "setting": setting,
        "rounds": options.rounds,
        "peers_keep_freed_memory": not options.plain_peers,
        "left_out": left_out,
    }
    claims = claims_of(setting, rows)
    show(figures, setting, rows, claims)
    print_json(options, figures | {"rows": rows, "claims": claims})
    return 0


def choose_peers(options: argparse.Namespace, setting: Setting, folder: Path) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that work here, each in its fastest form, and why each of the others is left out."""
    peers: dict[str, Peer] = {}
    left_out: dict[str, str] = {}
    wanted = [name for name in PEERS if name in options.systems]
    if importlib.util.find_spec("transformers") is None:
        install = 'pip install -c requirements/constraints.txt -e ".[hf]"'
        return {}, dict.fromkeys(wanted, f"transformers is not installed: {install}")
    for name in wanted:
        say(f"{name}: a few steps with experts {' and '.join(FORMS[name])}, for the faster")
        candidates = [Peer(name, form, not options.plain_peers) for form in FORMS[name]]
        best, reason = choose_form(setting, candidates, folder)
        if best is None:
            left_out[name] = reason
        else:
            peers[name] = best
    return peers, left_out


def measure(
    options: argparse.Namespace, setting: Setting, peers: dict[str, Peer], folder: Path
) -> dict[str, list[Outcome]]:
    """Run every system in every round.

    Raises:
        RunFailed: A run did not end well.
    """
    trainers: dict[str, list[str]] = ({OURS: []} if OURS in options.systems else {}) | options.ours
    names = [*trainers, *peers]

    def run(name: str, number: int) -> Outcome:
        run_folder = folder / f"round_{number}_{names.index(name)}"
        if name in peers:
            outcome = run_peer(peers[name], setting, run_folder)
        else:
            outcome = run_trainer(name, setting, trainers[name], run_folder)
        rate = setting.tokens_per_step * setting.steps / outcome.seconds
        say(f"round {number + 1} of {options.rounds}: {name} {rate:,.0f} tokens/s")
        return outcome

    return run_rounds(names, options.rounds, run)


def details_of(setting: Setting, peers: dict[str, Peer], options: argparse.Namespace) -> dict[str, str]:
    """What each system runs with, in words."""
    spread = f"experts over {setting.ranks} ranks" if setting.ranks > 1 else "one rank"
    details = {OURS: spread} | {name: shlex.join(own) for name, own in options.ours.items()}
    for name, peer in peers.items():
        details[name] = f"{spread if name == AUTOEP else 'all experts on each rank'}; {peer.form}"
    return details
